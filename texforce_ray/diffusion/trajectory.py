"""The one batch type from sampler to loss. Plain numpy: any process can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trajectory:
    """B denoising trajectories of T steps.

    prompt_ids: one int64 [B, L] per text encoder.
    latents: storage dtype [B, M, C, h, w]; those that the objective reads of the T + 1 latents, x_T
    first and x_0 last (M = T + 1: all).
    slots: int64 [B, T + 1]; each latent's index in `latents`, -1 if it was not kept.
    timesteps: int64 [T], descending.
    log_probs: float32 [B, T]; under the policy that sampled; meaningless where sigma = 0. [B, 0] if
    that holds for all steps.
    prompts: B texts.
    seeds: int64 [B]; all noise of sample b came from one CPU generator with this seed.
    policy_version: version of the adapter that sampled.
    """

    prompt_ids: tuple[np.ndarray, ...]
    latents: np.ndarray
    slots: np.ndarray
    timesteps: np.ndarray
    log_probs: np.ndarray
    prompts: tuple[str, ...]
    seeds: np.ndarray
    policy_version: int

    def __len__(self) -> int:
        return len(self.latents)

    def latents_at(self, sample: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The latents before each (sample, step), [P, C, h, w]; `step` T is x_0.

        Raises:
            LookupError: one of them was not kept.
        """
        slots = self.slots[sample, step]
        if (slots < 0).any():
            raise LookupError("a latent was not kept: the objective's kept_latents must name it")
        return self.latents[sample, slots]

    @property
    def nbytes(self) -> int:
        """Size of its arrays in bytes."""
        arrays = (*self.prompt_ids, self.latents, self.slots, self.timesteps)
        arrays += (self.log_probs, self.seeds)
        return sum(array.nbytes for array in arrays)


def concatenate(trajectories: Sequence[Trajectory]) -> Trajectory:
    """Join batches in order.

    Raises:
        ValueError: they differ in timesteps or policy version.
    """
    first = trajectories[0]
    for other in trajectories[1:]:
        if other.policy_version != first.policy_version:
            raise ValueError(
                f"trajectories of policy versions {first.policy_version} and "
                f"{other.policy_version} cannot be one batch"
            )
        if not np.array_equal(other.timesteps, first.timesteps):
            raise ValueError("trajectories with different timesteps cannot be one batch")
    encoders = range(len(first.prompt_ids))
    most = max(t.latents.shape[1] for t in trajectories)
    return Trajectory(
        prompt_ids=tuple(np.concatenate([t.prompt_ids[e] for t in trajectories]) for e in encoders),
        latents=np.concatenate([_padded(t.latents, most) for t in trajectories]),
        slots=np.concatenate([t.slots for t in trajectories]),
        timesteps=first.timesteps,
        log_probs=np.concatenate([t.log_probs for t in trajectories]),
        prompts=tuple(prompt for t in trajectories for prompt in t.prompts),
        seeds=np.concatenate([t.seeds for t in trajectories]),
        policy_version=first.policy_version,
    )


def _padded(latents: np.ndarray, count: int) -> np.ndarray:
    """Padded to `count` latents per sample; no slot refers to the padding."""
    if (missing := count - latents.shape[1]) == 0:
        return latents
    return np.pad(latents, [(0, 0), (0, missing), *[(0, 0)] * (latents.ndim - 2)])
