"""Turns rewards into advantages, in numpy and index order: identical on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EPS = 1e-6
# A group of equal rewards must give advantages of 0, not amplified noise: a deviation below this
# share of the rewards' magnitude may be rounding (float32 has 6e-8).
_MIN_STD = 1e-6
_USUAL_STD = 1e-4  # above it, _EPS is negligible


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
        mask: bool [N], True where every component was scored that has a weight or a gate.
        components: R of them.
        prompts: N texts, needed for 'group'.
        never_raise: also cap a gated sample at its own ungated total.

    A gated sample gets its floor, capped at the lowest ungated total, so that it beats no
    ungated one, whatever the components' scale.
    """
    total, floor = np.zeros(len(rewards)), np.full(len(rewards), np.inf)
    for column, component in enumerate(components):
        if not component.weight and component.gate is None:
            continue  # held out: even a NaN is without effect
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
    """One component's values, normalised as configured: float64 [N]."""
    if normalize == "none" or not mask.any():
        return values
    if normalize == "group":
        return group_advantages(values, mask, prompts)
    return batch_advantages(values, mask)


def batch_advantages(total: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(r - mean) / std over the unmasked samples: float64 [N], 0 where masked."""
    if not mask.any():
        return np.zeros(len(total))
    scored = total[mask]
    std, scale = np.full(len(total), scored.std()), np.full(len(total), _size(scored))
    return _scaled(total - scored.mean(), std, mask, scale)


def group_advantages(
    total: np.ndarray, mask: np.ndarray, prompts: Sequence[str], scale: str = "own"
) -> np.ndarray:
    """`batch_advantages` within the samples of each prompt.

    With `scale` 'batch', the mean is the group's, but the deviation is that of all samples around
    their group's mean: groups with little spread then get small advantages.
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
        """Add rewards to their prompts' buffers and normalise with these: float64 [N].

        While a prompt has fewer than `min_count` rewards, the batch's statistics are used.
        """
        for prompt, value, is_scored in zip(prompts, total, mask, strict=True):
            if is_scored:
                buffer = self.buffers.setdefault(prompt, [])
                buffer.append(float(value))
                del buffer[: -self.buffer_size]
        scored = total[mask] if mask.any() else np.zeros(1)
        mean, std = np.full(len(total), scored.mean()), np.full(len(total), scored.std())
        size = np.full(len(total), _size(scored))
        for prompt in dict.fromkeys(prompts):
            buffer = self.buffers.get(prompt, [])
            if len(buffer) >= self.min_count:
                rows = np.array([p == prompt for p in prompts])
                mean[rows], std[rows], size[rows] = np.mean(buffer), np.std(buffer), _size(buffer)
        centered = total - mean
        if scale == "batch" and mask.any():
            std[:], size[:] = np.sqrt((centered[mask] ** 2).mean()), _size(scored)
        return _scaled(centered, std, mask, size)


def _size(values: np.ndarray | list[float]) -> float:
    return float(np.abs(values).max())


def _scaled(
    centered: np.ndarray, std: np.ndarray, mask: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """centered / std, or 0 where std is negligible next to `scale`, the rewards' magnitude."""
    useful = mask & (std > _MIN_STD * scale)
    eps = np.where(std > _USUAL_STD, _EPS, 0.0)
    return np.where(useful, centered / np.where(useful, std + eps, 1.0), 0.0)
