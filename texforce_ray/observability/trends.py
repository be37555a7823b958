"""Diverging trends: the trained reward rises while a held-out one falls, as in reward hacking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr

_SHORTEST, _USUAL, _LONGEST = (6, 8), 10, 640  # iterations in a window; longer ones double
_RISE_P, _FALL_P = 0.01, 0.0005  # one-sided; the fall is what healthy runs lack
_EFFECT = 0.3  # smallest change that counts, in standard deviations within an iteration
_MAX_CORRELATION = 0.9
_FLAT = 1e-6  # share of a mean that may be rounding
_RECOVERED = 3  # iterations whose average ends a divergence


@dataclass(frozen=True)
class Trend:
    """A linear trend over a window of iterations.

    first, last: averages of the window's first and last third. effect: their difference, in
    standard deviations of the samples within an iteration. p: probability that noise alone has so
    steep a slope in this direction.
    """

    first: float
    last: float
    effect: float
    p: float

    @staticmethod
    def of(means: np.ndarray, stds: np.ndarray, samples: int) -> Trend:
        """From the means and standard deviations of n >= 3 iterations: float64 [n] each.

        A t-test of the least-squares slope. The noise is that of the residuals, more if successive
        ones are correlated, or the sampling error, std / sqrt(samples), if that is larger.
        """
        n = len(means)
        x = np.arange(n) - (n - 1) / 2
        scale = (x**2).sum()
        slope = (x * means).sum() / scale
        residuals = means - means.mean() - slope * x
        square = float((residuals**2).sum())
        neighbours = float((residuals[1:] * residuals[:-1]).sum())
        correlation = min(max(neighbours / square, 0.0), _MAX_CORRELATION) if square > 0 else 0.0
        variance = square / (n - 2) * (1 + correlation) / (1 - correlation)
        error = np.sqrt(max(variance, float((stds**2).mean()) / samples) / scale)
        p = float(stdtr(n - 2, -abs(slope) / error)) if error > 0 else float(slope == 0)
        third = max(2, n // 3)
        first, last = float(means[:third].mean()), float(means[-third:].mean())
        unit = max(float(np.median(stds)), _FLAT * float(np.abs(means).max()))
        return Trend(first, last, (last - first) / unit if unit > 0 else 0.0, p)

    @property
    def rises(self) -> bool:
        return self.effect >= _EFFECT and self.p < _RISE_P

    @property
    def falls(self) -> bool:
        return self.effect <= -_EFFECT and self.p < _FALL_P


class Divergence:
    """Compares the trends of one trained and one held-out reward.

    Args:
        trained: of the metrics `reward/<trained>_mean` and `_std`.
        held_out: likewise.
        samples: of an iteration.
    """

    def __init__(self, trained: str, held_out: str, samples: int) -> None:
        self.trained, self.held_out, self.samples = trained, held_out, samples
        self._rows: list[list[float]] = []  # mean and std of each
        self._before: float | None = None  # the held-out reward before a fall already reported

    def look(self, metrics: Mapping[str, Any]) -> tuple[int, Trend, Trend] | None:
        """A divergence that is new in this iteration: window and both trends, trained first.

        It can be reported again only after the held-out reward has recovered.
        """
        names = (self.trained, self.held_out)
        keys = [f"reward/{name}_{kind}" for name in names for kind in ("mean", "std")]
        values = [metrics.get(key) for key in keys]
        row = [float("nan") if value is None else float(value) for value in values]
        if not np.isfinite(row).all():
            return None
        self._rows = [*self._rows[1 - _LONGEST :], row]
        rows = np.array(self._rows)
        if self._before is not None:
            if rows[-_RECOVERED:, 2].mean() >= self._before:
                self._before, self._rows = None, []
            return None
        for window in _windows(len(rows)):
            trained = Trend.of(rows[-window:, 0], rows[-window:, 1], self.samples)
            if trained.rises:
                held_out = Trend.of(rows[-window:, 2], rows[-window:, 3], self.samples)
                if held_out.falls:
                    self._before = held_out.first
                    return window, trained, held_out
        return None


def _windows(length: int) -> Iterator[int]:
    """Window lengths, shortest first, up to `length`: 6, 8, 10, 20, 40, ..."""
    yield from (window for window in _SHORTEST if window <= length)
    window = _USUAL
    while window <= length:
        yield window
        window *= 2
