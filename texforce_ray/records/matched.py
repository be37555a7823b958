"""Appearance at matched reward (the paper's Fig. 4): what did a gain in reward cost in looks?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Curve:
    """A run's evaluations in order: reward and drift from the base model, float [E] each.

    The first point is the base model itself, if its reward is known: at drift 0.
    """

    name: str
    iterations: tuple[int, ...]
    reward: tuple[float, ...]
    drift: tuple[float, ...]

    def points(self) -> list[dict[str, float]]:
        keys = ("iteration", "reward", "drift")
        columns = (self.iterations, self.reward, self.drift)
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]

    @staticmethod
    def mean(name: str, runs: Sequence[Sequence[Mapping[str, float]]]) -> Curve:
        """The mean of several runs' points, up to the end of the shortest run."""
        length = min(map(len, runs))

        def column(key: str) -> tuple[float, ...]:
            values = np.array([[point[key] for point in run[:length]] for run in runs])
            return tuple(values.mean(axis=0).tolist())

        iterations = tuple(int(point["iteration"]) for point in runs[0][:length])
        return Curve(name, iterations, column("reward"), column("drift"))

    def drift_at(self, reward: float) -> float | None:
        """Drift where the reward was first reached, interpolated linearly between evaluations."""
        for index, (r, d) in enumerate(zip(self.reward, self.drift, strict=True)):
            if r >= reward:
                if index == 0:
                    return d
                before, drift = self.reward[index - 1], self.drift[index - 1]
                return drift + (d - drift) * (reward - before) / (r - before)
        return None


def curve_of(name: str, metrics: Sequence[Mapping[str, Any]], reward: str = "total") -> Curve:
    """The curve of one reward in a run's metrics; empty if it was not evaluated during training.

    It begins with the base model if the metrics hold its reward.
    """
    key, base = f"eval/{reward}", f"eval/base_{reward}"
    rows = [m for m in metrics if _known(m, key) and _known(m, "eval/drift")]
    if rows and rows[0].get("eval/total") == rows[0][key]:
        base = "eval/base_total"  # it is the only reward
    if rows and _known(rows[0], base):
        rows = [{key: rows[0][base], "eval/drift": 0.0, "iteration": -1}, *rows]
    return Curve(
        name,
        tuple(int(m["iteration"]) + 1 for m in rows),
        tuple(float(m[key]) for m in rows),
        tuple(float(m["eval/drift"]) for m in rows),
    )


def shared_reward(runs: Sequence[Sequence[Mapping[str, Any]]]) -> str | None:
    """The reward to compare runs by: the total if their rewards are the same, else a shared one.

    Totals of different rewards are different quantities.
    """
    found = [_rewards(metrics) for metrics in runs]
    if not found:
        return None
    if all(rewards == found[0] for rewards in found):
        return "total"
    shared = [name for name in found[0] if all(name in rewards for rewards in found)]
    return shared[0] if shared else None


def _rewards(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for record in metrics for key in record)
    names = [key.removeprefix("eval/") for key in keys if key.startswith("eval/")]
    other = ("total", "diversity", "drift", "style_drift", "high_frequency", "grid")
    return sorted(name for name in names if name not in other and not name.startswith("base_"))


def matched_reward(curves: Sequence[Curve]) -> float | None:
    """The highest reward that every curve reached; None unless all rose above their start."""
    if not curves or any(not curve.reward for curve in curves):
        return None
    reached = min(max(curve.reward) for curve in curves)
    return reached if all(reached > curve.reward[0] for curve in curves) else None


def _known(record: Mapping[str, Any], key: str) -> bool:
    value = record.get(key)
    return isinstance(value, int | float) and math.isfinite(value)
