"""Watches a run's metrics for slow failures: collapse of the reward, reward hacking."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from texforce_ray.config.rewards import RewardConfig, trends_of
from texforce_ray.observability.trends import Divergence

_WINDOW = 5  # iterations per average: single ones are noisy
_FLAT = 1e-6
_HALF = 0.5
# Growth of an artefact that is too much: more than twice the base model's value and this. Between
# drawings with blurred and with sharp edges, the share of high frequencies differs by 0.027; a grid
# with a contrast of 0.01, or 2.5 of 255 levels, is about to become visible.
_GROWTH = 2
_MARGINS = {"high_frequency": 0.03, "grid": 0.01}
_ARTEFACTS = {
    "high_frequency": "noise or fine texture; sharper images have more high frequencies too",
    "grid": "a periodic pattern",
}


class LearningAlarms:
    """Checks every iteration's metrics in turn; warns once about what a user should look at.

    Args:
        earlier: a resumed run's metrics, whose warnings are not repeated.
        rewards: the run's; those that are held out are compared with the trained ones.
        samples: of an iteration.
    """

    def __init__(
        self,
        earlier: Sequence[Mapping[str, Any]] = (),
        rewards: Sequence[RewardConfig] = (),
        samples: int = 1,
    ) -> None:
        self._rewards: list[float] = []
        self._spread: list[float] = []
        self._largest: list[float] = []  # advantages
        self._diversity: list[float] = []
        self._said: set[str] = set()
        self._pairs = [Divergence(*pair, samples) for pair in product(*trends_of(rewards))]
        self._checks: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
            "collapse": self._collapse,
            "signal": self._no_signal,
            "sameness": self._sameness,
            **{name: partial(self._artefact, name) for name in _MARGINS},
            "skipped": self._skipped,
        }
        for metrics in earlier:
            self.look(metrics)

    def look(self, metrics: Mapping[str, Any]) -> list[str]:
        """New warnings after one iteration; each names the metric and the iteration."""
        found = []
        for name, check in self._checks.items():
            text = check(metrics)
            if text is None:
                self._said.discard(name)
            elif name not in self._said:
                self._said.add(name)
                found.append(text)
        found += [text for pair in self._pairs if (text := _divergence(pair, metrics))]
        return [f"iteration {metrics.get('iteration')}: {text}" for text in found]

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
            return "unchanged" if "sameness" in self._said else None
        self._diversity.append(float(value))
        if value >= _HALF * self._diversity[0]:
            return None
        return (
            f"eval/diversity has fallen from {self._diversity[0]:.3f} to {value:.3f}: images of "
            "one prompt look alike; check images/ for what fools the reward"
        )

    def _artefact(self, name: str, metrics: Mapping[str, Any]) -> str | None:
        """The images of an evaluation have far more of an artefact than the base model's."""
        value, base = metrics.get(f"eval/{name}"), metrics.get(f"eval/base_{name}")
        if value is None or base is None:
            return "unchanged" if name in self._said else None
        if value <= _GROWTH * base + _MARGINS[name]:
            return None
        return (
            f"eval/{name} is {value:.3f}, against {base:.3f} of the base model "
            f"(eval/base_{name}; same prompts and seeds): {_ARTEFACTS[name]}; check images/ for "
            "what fools the reward"
        )

    def _skipped(self, metrics: Mapping[str, Any]) -> str | None:
        count = metrics.get("learner/skipped", 0)
        if not count:
            return None
        return f"learner/skipped: {count} updates were skipped: their gradients were not finite"


def _divergence(pair: Divergence, metrics: Mapping[str, Any]) -> str | None:
    found = pair.look(metrics)
    if found is None:
        return None
    window, trained, held_out = found
    return (
        f"reward/{pair.trained}_mean has risen from {trained.first:.4g} to {trained.last:.4g} over "
        f"the last {window} iterations, while reward/{pair.held_out}_mean, which is held out, has "
        f"fallen from {held_out.first:.4g} to {held_out.last:.4g}: the policy may be hacking the "
        "reward; check images/ for what fools it; an earlier checkpoint, a smaller optimizer.lr, "
        "with PPO a larger objective.kl_weight, or a weight for the held-out reward may help"
    )


def _averages(values: Sequence[float]) -> np.ndarray:
    if len(values) < _WINDOW:
        return np.empty(0)
    return np.convolve(values, np.full(_WINDOW, 1 / _WINDOW), mode="valid")
