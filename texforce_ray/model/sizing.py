"""Batch sizes from memory: measured once, before a run starts, and then part of its config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from texforce_ray.config import Config
from texforce_ray.errors import ResourceError

# On a CPU larger batches are not faster: their activations leave the caches.
CPU_BATCH, CPU_MICROBATCH = 32, 64
_MOST = 1024
_ENOUGH = 8  # pairs of a microbatch, for which activations are better kept than computed again
_SHARE = 0.9  # of a process's part of the memory; the rest is for fragments and other libraries


def batch_candidates(config: Config) -> list[int]:
    """Divisors of an iteration's samples, ascending."""
    samples = config.samples_per_iteration
    return [n for n in range(1, min(samples, _MOST) + 1) if samples % n == 0]


def microbatch_candidates(most: int = _MOST) -> list[int]:
    """Powers of two, ascending, up to the first that holds `most` pairs."""
    return [2**n for n in range((min(most, _MOST) - 1).bit_length() + 1)]


def largest_that_fits(
    peak_bytes: Callable[[int], float], candidates: Sequence[int], budget: float
) -> int:
    """The largest candidate whose peak stays within `budget`, assuming memory linear in size.

    Raises:
        ResourceError: not even the smallest one fits.
    """
    least = candidates[0]
    if (one := peak_bytes(least)) > budget:
        needed = f"{one / 2**30:.1f} GiB" if one < float("inf") else "more than all"
        raise ResourceError(
            f"a batch of {least} needs {needed} of the device's memory, but this actor may use "
            f"{budget / 2**30:.1f} GiB; use half precision (model.dtype=float16), "
            "learner.gradient_checkpointing=true, or a larger num_gpus"
        )
    if len(candidates) == 1:
        return least
    slope = max(1.0, (peak_bytes(candidates[1]) - one) / (candidates[1] - least))
    for size in reversed(candidates):
        # The line is only an estimate: measure before returning a size.
        if one + slope * (size - least) <= budget and peak_bytes(size) <= budget:
            return size
    return least


def keeping_if_enough(found: Callable[[bool], int], most: int) -> tuple[int, bool]:
    """The size of a microbatch, and whether activations are computed again instead of kept.

    They are kept if enough pairs fit, or all that there can be.

    Args:
        found: the largest size that fits; given whether activations are computed again.
        most: the largest useful size.

    Raises:
        ResourceError: not even one pair fits either way.
    """
    with suppress(ResourceError):
        if (size := found(False)) >= min(_ENOUGH, most):
            return size, False
    return found(True), True


def budget(device: torch.device, num_gpus: float) -> float:
    """Bytes of a device's memory that a process with `num_gpus` of it may use."""
    total = torch.cuda.get_device_properties(device).total_memory
    return _SHARE * min(1.0, num_gpus or 1.0) * total


def peak(device: torch.device, work: Callable[[], object]) -> float:
    """Peak of the device's memory in bytes during `work`; infinite if it runs out."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        work()
    except torch.cuda.OutOfMemoryError:
        return float("inf")
    return float(torch.cuda.max_memory_reserved(device))
