"""Watches a run's metrics for slow failures: collapse of the reward, loss of diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_WINDOW = 5  # iterations per average: single ones are noisy
_FLAT = 1e-6
_HALF = 0.5


class LearningAlarms:
    """Checks every iteration's metrics in turn; warns once about what a user should look at."""

    def __init__(self, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        self._rewards: list[float] = []
        self._spread: list[float] = []
        self._largest: list[float] = []  # advantages
        self._diversity: list[float] = []
        self._said: set[str] = set()
        for metrics in earlier:  # of a resumed run: do not repeat its warnings
            self.look(metrics)

    def look(self, metrics: Mapping[str, Any]) -> list[str]:
        """New warnings after one iteration; each names the metric and the iteration."""
        found = []
        for check in (self._collapse, self._no_signal, self._sameness, self._skipped):
            text = check(metrics)
            if text is None:
                self._said.discard(check.__name__)
            elif check.__name__ not in self._said:
                self._said.add(check.__name__)
                found.append(f"iteration {metrics.get('iteration')}: {text}")
        return found

    def _collapse(self, metrics: Mapping[str, Any]) -> str | None:
        """The average is below the best one by more than the spread within an iteration."""
        mean, std = metrics.get("reward/total_mean"), metrics.get("reward/total_std")
        if mean is None or std is None:
            return None
        self._rewards.append(float(mean))
        self._spread.append(float(std))
        averages = _averages(self._rewards)
        if not len(averages):
            return None
        best, now, spread = averages.max(), averages[-1], float(np.median(self._spread))
        if best - now <= max(spread, _FLAT * abs(best)):
            return None
        return (
            f"reward/total_mean has fallen from {best:.3f} to {now:.3f} (averages of {_WINDOW} "
            "iterations); a smaller optimizer.lr may help, and with PPO a larger "
            "objective.kl_weight; the best checkpoint is kept"
        )

    def _no_signal(self, metrics: Mapping[str, Any]) -> str | None:
        """All samples that are compared score the same: every advantage is 0."""
        if (largest := metrics.get("advantage/abs_max")) is None:
            return None
        self._largest.append(float(largest))
        if len(self._largest) < _WINDOW or max(self._largest[-_WINDOW:]) > 0:
            return None
        return (
            f"advantage/abs_max has been 0 for {_WINDOW} iterations: all samples that are compared "
            "with each other score the same (reward/total_std is the spread over all samples), so "
            "there is nothing to learn from"
        )

    def _sameness(self, metrics: Mapping[str, Any]) -> str | None:
        """Images of one prompt have become alike: less than half as different as at first."""
        value = metrics.get("eval/diversity")
        if value is None or not np.isfinite(value):  # NaN: no prompt has two images
            # Between evaluations the last finding stands.
            return "unchanged" if "_sameness" in self._said else None
        self._diversity.append(float(value))
        if value >= _HALF * self._diversity[0]:
            return None
        return (
            f"eval/diversity has fallen from {self._diversity[0]:.3f} to {value:.3f}: images of "
            "one prompt look alike; check images/ for what fools the reward"
        )

    def _skipped(self, metrics: Mapping[str, Any]) -> str | None:
        count = metrics.get("learner/skipped", 0)
        if not count:
            return None
        return f"learner/skipped: {count} updates were skipped: their gradients were not finite"


def _averages(values: Sequence[float]) -> np.ndarray:
    if len(values) < _WINDOW:
        return np.empty(0)
    return np.convolve(values, np.full(_WINDOW, 1 / _WINDOW), mode="valid")
