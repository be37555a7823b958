"""Rewards to advantages, in numpy, in index order: the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EPS = 1e-6
# A group whose rewards are all equal teaches nothing, rather than noise: below this share of the
# rewards' own size, whatever their scale, a deviation may be rounding (float32 has 6e-8).
_MIN_STD = 1e-6
_USUAL_STD = 1e-4  # above it, _EPS is nothing


@dataclass(frozen=True)
class Component:
    """How one reward enters the total.

    normalize: 'none'; 'batch' or 'group' (mean 0, deviation 1 over the unmasked samples of the
    iteration or of each prompt). gate: raw score below which a sample's total is the floor.
    """

    weight: float
    normalize: str = "none"
    gate: float | None = None
    floor: float = 0.0


def combine(
    rewards: np.ndarray,
    mask: np.ndarray,
    components: Sequence[Component],
    prompts: Sequence[str] = (),
    *,
    never_raise: bool = False,
) -> np.ndarray:
    """Weighted sum of reward components: float64 [N]; 0 where masked.

    Args:
        rewards: float64 [N, R], raw values; NaN where a component could not be scored.
        mask: bool [N], True where every component was scored.
        components: R of them.
        prompts: N texts, needed for 'group'.
        never_raise: a gated sample gets no more than its own total would have been, either.

    A gated sample gets its floor, but no more than the lowest ungated total: it loses whatever
    scale the components have.
    """
    total, floor = np.zeros(len(rewards)), np.full(len(rewards), np.inf)
    for column, component in enumerate(components):
        raw = np.where(mask, rewards[:, column], 0.0)
        total += component.weight * _shifted(raw, mask, component.normalize, prompts)
        if component.gate is not None:
            under = mask & (raw < component.gate)
            floor[under] = np.minimum(floor[under], component.floor)
    gated = np.isfinite(floor)
    passed = mask & ~gated
    if never_raise:
        floor = np.minimum(floor, total)
    if gated.any() and passed.any():
        floor = np.minimum(floor, total[passed].min())
    return np.where(mask, np.where(gated, floor, total), 0.0)


def _shifted(
    values: np.ndarray, mask: np.ndarray, normalize: str, prompts: Sequence[str]
) -> np.ndarray:
    """Values of one component, normalised as it says: float64 [N]."""
    if normalize == "none" or not mask.any():
        return values
    if normalize == "group":
        return group_advantages(values, mask, prompts)
    return batch_advantages(values, mask)


def batch_advantages(total: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(r - mean) / std over the unmasked samples: float64 [N], 0 where masked."""
    if not mask.any():
        return np.zeros(len(total))
    known = total[mask]
    std, scale = np.full(len(total), known.std()), np.full(len(total), _size(known))
    return _scaled(total - known.mean(), std, mask, scale)


def group_advantages(
    total: np.ndarray, mask: np.ndarray, prompts: Sequence[str], scale: str = "own"
) -> np.ndarray:
    """As `batch_advantages`, within the samples of each prompt.

    With `scale` 'batch' the mean is the group's and the deviation that of all samples around
    their group's mean: groups in which little is at stake then weigh little.
    """
    centered, deviation, scale_of = (np.zeros(len(total)) for _ in range(3))
    for prompt in dict.fromkeys(prompts):
        rows = np.array([p == prompt for p in prompts]) & mask
        if rows.any():
            centered[rows] = total[rows] - total[rows].mean()
            deviation[rows], scale_of[rows] = total[rows].std(), _size(total[rows])
    if scale == "batch" and mask.any():
        deviation[:] = np.sqrt((centered[mask] ** 2).mean())
        scale_of[:] = _size(total[mask])
    return _scaled(centered, deviation, mask, scale_of)


class PromptStatistics:
    """A rolling buffer of rewards per prompt (DDPO, appendix; TexForce section 3.2)."""

    def __init__(
        self, buffer_size: int, min_count: int, remembered: dict[str, list[float]] | None = None
    ) -> None:
        self.buffer_size, self.min_count = buffer_size, min_count
        self.buffers = {prompt: list(values) for prompt, values in (remembered or {}).items()}

    def copy(self) -> PromptStatistics:
        return PromptStatistics(self.buffer_size, self.min_count, self.buffers)

    def advantages(
        self, total: np.ndarray, mask: np.ndarray, prompts: Sequence[str], scale: str = "own"
    ) -> np.ndarray:
        """Add rewards to their prompts' buffers and normalise by them: float64 [N].

        While a prompt has fewer than `min_count` rewards, the batch's statistics are used.
        """
        for prompt, value, known in zip(prompts, total, mask, strict=True):
            if known:
                buffer = self.buffers.setdefault(prompt, [])
                buffer.append(float(value))
                del buffer[: -self.buffer_size]
        known = total[mask] if mask.any() else np.zeros(1)
        mean, std = np.full(len(total), known.mean()), np.full(len(total), known.std())
        size = np.full(len(total), _size(known))
        for prompt in dict.fromkeys(prompts):
            buffer = self.buffers.get(prompt, [])
            if len(buffer) >= self.min_count:
                rows = np.array([p == prompt for p in prompts])
                mean[rows], std[rows], size[rows] = np.mean(buffer), np.std(buffer), _size(buffer)
        centered = total - mean
        if scale == "batch" and mask.any():
            std[:], size[:] = np.sqrt((centered[mask] ** 2).mean()), _size(known)
        return _scaled(centered, std, mask, size)


def _size(values: np.ndarray | list[float]) -> float:
    return float(np.abs(values).max())


def _scaled(
    centered: np.ndarray, std: np.ndarray, mask: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """centered / std, or 0 where std is nothing beside `scale`, the rewards' own size."""
    useful = mask & (std > _MIN_STD * scale)
    eps = np.where(std > _USUAL_STD, _EPS, 0.0)
    return np.where(useful, centered / np.where(useful, std + eps, 1.0), 0.0)
