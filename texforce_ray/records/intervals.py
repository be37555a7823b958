"""Bootstrap intervals of mean scores, which resample groups of dependent values as a whole.

Images of one prompt are alike, not independent samples: if an evaluation has several prompts,
prompts are resampled, each with all of its images (a cluster bootstrap). If policies of several
training seeds are compared on the same images, seeds and prompts are resampled independently and
every chosen seed is combined with every chosen prompt (crossed), since a hard prompt is hard for
all seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from texforce_ray import randomness

_RESAMPLES = 2000


def bootstrap_interval(
    values: np.ndarray, prompts: Sequence[str] | None = None, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean of float64 [N]; NaN is ignored.

    Args:
        values: one score of each image, or differences of paired ones.
        prompts: one for each of the N images; without them, or with one distinct prompt, images
            are resampled.
        seed: of the resampling.
    """
    return crossed_interval(values[None], prompts, seed)


def crossed_interval(
    values: np.ndarray, prompts: Sequence[str] | None = None, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of float64 [S, N]: S training seeds on the same N images.

    With one seed, it reflects the variation between prompts, but not between training runs.
    """
    known = ~np.isnan(values)
    if not known.any():
        return float("nan"), float("nan")
    groups = _groups(prompts, known.any(axis=0))
    sums = np.stack([np.bincount(groups, row) for row in np.where(known, values, 0.0)])
    counts = np.stack([np.bincount(groups, row) for row in known.astype(float)])
    filled = counts.any(axis=0)  # a prompt without any score cannot be drawn
    sums, counts = sums[:, filled], counts[:, filled]
    rng = randomness.generator(seed, randomness.BOOTSTRAP)
    seeds, drawn = (_draws(rng, size) for size in sums.shape)
    total = np.einsum("rs,sp,rp->r", seeds, sums, drawn, optimize=True)
    count = np.einsum("rs,sp,rp->r", seeds, counts, drawn, optimize=True)
    with np.errstate(invalid="ignore"):  # a resample without any score
        low, high = np.nanpercentile(total / count, [2.5, 97.5])
    return float(low), float(high)


def _groups(prompts: Sequence[str] | None, known: np.ndarray) -> np.ndarray:
    """Which images are drawn together: int64 [N]."""
    if prompts is not None:
        groups = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)[1]
        if len(np.unique(groups[known])) > 1:
            return groups
    return np.arange(len(known))


def _draws(rng: np.random.Generator, size: int) -> np.ndarray:
    """How often each of `size` things is drawn in each resample: [R, size]."""
    return rng.multinomial(size, np.full(size, 1 / size), _RESAMPLES).astype(float)
