"""The driver's advantages: rewards of an iteration against the configured baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from texforce_ray.config import Config
from texforce_ray.rl.advantage import (
    Component,
    PromptStatistics,
    batch_advantages,
    combine,
    group_advantages,
)

if TYPE_CHECKING:
    from texforce_ray.driver.collect import ScoredBatch


class AdvantageEstimator:
    """Keeps statistics of each prompt's rewards between iterations.

    `advantages` does not change them; `commit` adds the new rewards once the update has succeeded,
    so that an interrupted iteration leaves no trace.
    """

    def __init__(self, config: Config, remembered: dict[str, list[float]]) -> None:
        self.config = config
        a = config.advantage
        self.statistics = PromptStatistics(a.buffer_size, a.min_count, remembered)
        self._next = self.statistics

    def advantages(self, batch: ScoredBatch, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weighted total and clipped advantage of each sample, float64 [N] each; 0 where masked."""
        a, rewards = self.config.advantage, self.config.rewards
        components = [Component(r.weight, r.normalize, r.min, r.floor) for r in rewards]
        total = combine(batch.rewards, mask, components, batch.prompts)
        if a.mode == "prompt":
            self._next = self.statistics.copy()
            advantages = self._next.advantages(total, mask, batch.prompts, a.scale)
        elif a.mode == "group":
            advantages = group_advantages(total, mask, batch.prompts, a.scale)
        else:
            advantages = batch_advantages(total, mask)
        return total, np.clip(advantages, -a.clip, a.clip)

    def commit(self) -> None:
        """Remember the rewards of the last call of `advantages`."""
        self.statistics = self._next
