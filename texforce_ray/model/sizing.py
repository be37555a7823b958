"""Batch sizes from memory: measured once, before a run starts, and then part of its config."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from texforce_ray.config import Config
from texforce_ray.diffusion import ddim
from texforce_ray.diffusion.sampler import Sampler, policy_output
from texforce_ray.errors import ResourceError
from texforce_ray.model.backbone import Backbone

# On a CPU larger batches are not faster: their activations leave the caches.
CPU_BATCH, CPU_MICROBATCH = 32, 64
_MOST = 1024
_SHARE = 0.9  # of a process's part of the device's memory: fragments, other libraries


def batch_candidates(config: Config) -> list[int]:
    """Divisors of an iteration's samples, ascending."""
    samples = config.samples_per_iteration
    return [n for n in range(1, min(samples, _MOST) + 1) if samples % n == 0]


def microbatch_candidates() -> list[int]:
    return [2**n for n in range(_MOST.bit_length())]


def largest_that_fits(
    peak_bytes: Callable[[int], float], candidates: Sequence[int], budget: float
) -> int:
    """The largest candidate whose peak stays within `budget`, taking memory as linear in size.

    Raises:
        ResourceError: not even the smallest one does.
    """
    least = candidates[0]
    if len(candidates) == 1 or (one := peak_bytes(least)) > budget:
        if peak_bytes(least) > budget:
            raise ResourceError(
                f"a batch of {least} needs {peak_bytes(least) / 2**30:.1f} GiB of the device's "
                f"memory, this actor may use {budget / 2**30:.1f} GiB; use half precision "
                "(model.dtype=float16), learner.gradient_checkpointing=true, or a larger num_gpus"
            )
        return least
    slope = max(1.0, (peak_bytes(candidates[1]) - one) / (candidates[1] - least))
    for size in reversed(candidates):
        # The line is a guess; what it promises is tried.
        if one + slope * (size - least) <= budget and peak_bytes(size) <= budget:
            return size
    return least


def rollout_bytes(backbone: Backbone, config: Config) -> Callable[[int], float]:
    """Peak memory of a unit of work, by its size; infinite where the device runs out."""
    d = config.diffusion
    sampler = Sampler(
        backbone,
        steps=2,
        eta=d.eta,
        guidance_scale=d.guidance_scale,
        decode_batch_size=config.rollout.decode_batch_size,
    )
    return lambda size: _peak(
        backbone, lambda: sampler.sample(["a prompt"] * size, np.arange(size), 0)
    )


def update_bytes(backbone: Backbone, config: Config) -> Callable[[int], float]:
    """Peak memory of one pass of the learner through the U-Net and back, by its pairs."""
    d = config.diffusion
    table = ddim.step_table(backbone.scheduler, d.steps, d.eta).to(backbone.device)
    if config.learner.gradient_checkpointing:
        backbone.unet.enable_gradient_checkpointing()

    def run(size: int) -> None:
        with torch.enable_grad():
            prepared = backbone.prepare(backbone.encode(backbone.tokenize(["", "a prompt"]).ids))
            leaf = prepared.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
            x = torch.zeros(size, *backbone.latent_shape, device=backbone.device)
            step = torch.zeros(size, dtype=torch.long, device=backbone.device)
            rows = np.ones(size, dtype=np.int64)
            policy_output(backbone, table, step, x, leaf, rows, d.guidance_scale).sum().backward()

    return lambda size: _peak(backbone, lambda: run(size))


def budget(backbone: Backbone, num_gpus: float) -> float:
    """What a process that was given `num_gpus` of a device may use of its memory."""
    total = torch.cuda.get_device_properties(backbone.device).total_memory
    return _SHARE * min(1.0, num_gpus or 1.0) * total


def _peak(backbone: Backbone, work: Callable[[], object]) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(backbone.device)
    try:
        work()
    except torch.cuda.OutOfMemoryError:
        return float("inf")
    return float(torch.cuda.max_memory_reserved(backbone.device))
