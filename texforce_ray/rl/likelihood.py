"""The current policy's likelihood of sampled trajectories: the learner's forward passes.

(sample, step) pairs of a trajectory form one large batch, regardless of their timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from texforce_ray.diffusion.denoiser import Denoiser
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.model.conditioning import Conditioning, Prepared
from texforce_ray.model.padding import padded
from texforce_ray.model.transfer import arrived, to_device, to_host


@dataclass(frozen=True)
class Pairs:
    """(sample, step) pairs, sample-major, the same number per sample: int64 [P] each."""

    sample: np.ndarray
    step: np.ndarray
    per_sample: int = 1

    @staticmethod
    def of(rows: np.ndarray, steps: np.ndarray, first: int = 0) -> Pairs:
        """The pairs of samples `rows` (int64 [R]); steps: int64 [N, K], each sample's steps."""
        count = steps.shape[1]
        return Pairs(np.repeat(rows - first, count), steps[rows].reshape(-1), count)

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, index: slice) -> Pairs:
        return Pairs(self.sample[index], self.step[index])

    def chunks(self, size: int, *, whole: bool = True) -> Iterator[slice]:
        """Consecutive parts of at most `size` pairs; `whole`: of whole samples, if one fits."""
        if whole:
            size = max(size - size % self.per_sample, min(size, self.per_sample))
        for first in range(0, len(self), size):
            yield slice(first, min(first + size, len(self)))


class Likelihood:
    """Means and log-probabilities of denoising steps under the current weights."""

    def __init__(self, denoiser: Denoiser, microbatch_size: int, most: int | None = None) -> None:
        """`most`: pairs of a whole minibatch, if known: compiled batches need not be larger."""
        least = padded(min(microbatch_size, most or microbatch_size))
        self.denoiser = replace(denoiser, least=least)
        self.microbatch_size = microbatch_size

    def encode(self, trajectory: Trajectory, rows: np.ndarray) -> tuple[Conditioning, np.ndarray]:
        """Distinct prompts of samples `rows`, with gradient, and each sample's index into them."""
        return self.denoiser.encode(tuple(torch.from_numpy(p[rows]) for p in trajectory.prompt_ids))

    def chunks(self, pairs: Pairs, size: int) -> Iterator[slice]:
        """Microbatches: parts of at most `size` pairs.

        Pairs of one sample share a prompt, which makes attention cheaper (`model.attention`), but
        not in compiled networks, whose batches are all of one size.
        """
        return pairs.chunks(size, whole=not self.denoiser.backbone.compiled)

    def mean(
        self, trajectory: Trajectory, pairs: Pairs, prepared: Prepared, where: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """The policy's mean at each pair, float32 [P, C, h, w], and its step, int64 [P].

        `where` (int64 [P]) is each pair's index into the prepared prompts.
        """
        step = to_device(pairs.step, self.denoiser.device)
        x = self.latents(trajectory, pairs.sample, pairs.step).float()
        return self.denoiser.mean(step, x, prepared, where), step

    def density(self, trajectory: Trajectory, pairs: Pairs, step: Tensor, mean: Tensor) -> Tensor:
        """Log-probabilities of the sampled latents, given the means: float32 [P]."""
        following = self.latents(trajectory, pairs.sample, pairs.step + 1)
        return self.denoiser.process.log_prob(step, following.float(), mean)

    @torch.no_grad()
    def log_probs(
        self,
        trajectory: Trajectory,
        pairs: Pairs,
        microbatch_size: int | None = None,
        means: dict[tuple[int, int], Tensor] | None = None,
    ) -> Tensor:
        """Log-probabilities under the current weights, float32 [P], without gradient.

        Args:
            trajectory: what was sampled.
            pairs: which samples and steps.
            microbatch_size: pairs in one pass; default: the learner's own.
            means: gets each pair's mean too, by (row, step), on the CPU.
        """
        if not len(pairs):
            return torch.zeros(0, device=self.denoiser.device)
        rows, local = np.unique(pairs.sample, return_inverse=True)
        conditioning, prompt = self.encode(trajectory, rows)
        prepared = self.denoiser.prepare(conditioning)
        parts = []
        for chunk in self.chunks(pairs, microbatch_size or self.microbatch_size):
            part = pairs[chunk]
            mean, step = self.mean(trajectory, part, prepared, prompt[local[chunk]])
            parts.append(self.density(trajectory, part, step, mean))
            if means is not None:
                places = zip(part.sample.tolist(), part.step.tolist(), strict=True)
                means |= dict(zip(places, to_host(mean), strict=True))
        if means is not None:
            arrived(self.denoiser.device)
        return torch.cat(parts)

    def latents(self, trajectory: Trajectory, sample: np.ndarray, step: np.ndarray) -> Tensor:
        """The stored latents before each (sample, step), on the device."""
        return to_device(trajectory.latents_at(sample, step), self.denoiser.device)
