"""A denoising process as a Markov decision process: its steps, their means and their likelihoods.

A process receives the network's output and knows nothing about networks. `Ddim` is one; your own
process is a subclass: see docs/extending.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from texforce_ray.errors import ConfigError

_Self = TypeVar("_Self", bound="Process")


class Process(ABC):
    """T steps, the noisiest first. `step` is int64 [B], the index of each sample's step.

    timesteps: [T], the network's input at each step. sigma: [T], standard deviation of the
    noise that a step adds; a step with sigma = 0 has no likelihood. Latents x are float [B, C, h,
    w], and so is the network's output.
    """

    timesteps: Tensor
    sigma: Tensor

    # Of the noise that steps draw; None: the network's, as for the start of denoising.
    step_noise_dtype: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property  # reading sigma waits for the device
    def trainable(self) -> list[int]:
        """Indices of the steps that have a likelihood."""
        return [i for i, sigma in enumerate(self.sigma.tolist()) if sigma > 0]

    @property
    def draws(self) -> Sequence[int]:
        """The steps at which noise is drawn, ascending: all, unless none has a likelihood."""
        return range(len(self)) if self.trainable else ()

    def windowed(self: _Self, steps: Sequence[int]) -> _Self:
        """The same process with noise in `steps` alone, and deterministic steps elsewhere."""
        del steps
        raise ConfigError(
            f"diffusion.window: the process {type(self).__name__} has none; leave it null"
        )

    @abstractmethod
    def to(self: _Self, device: torch.device) -> _Self:
        """The same process with its tensors on a device."""

    def start(self, noise: Tensor) -> Tensor:
        """The latent from which denoising starts, given unit noise of its shape."""
        return noise

    @abstractmethod
    def x0(self, step: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """The clean latent that the network's output stands for."""

    @abstractmethod
    def mean(self, step: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """Mean of the next latent."""

    @abstractmethod
    def forward(self, step: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """A clean latent noised to the step's level, as for the network's own training."""

    def target(self, step: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """The output that means exactly `x0` where `forward` has added `noise`.

        It follows from `x0(step, x, output)`, which is affine in the output.
        """
        x = self.forward(step, x0, noise)
        rest = self.x0(step, x, torch.zeros_like(x))
        slope = self.x0(step, torch.zeros_like(x), torch.ones_like(x))
        return (x0 - rest) / slope

    def slope(self) -> Tensor:
        """|d mean / d output| of each step, [T]: what a change of the network's output does.

        `mean(step, x, output)` is affine in the output.
        """
        step = torch.arange(len(self), device=self.timesteps.device)
        x = torch.zeros(len(self), 1, 1, 1, device=step.device)
        return (self.mean(step, x, x + 1) - self.mean(step, x, x)).abs().reshape(-1)

    def sensitivity(self) -> Tensor:
        """|d mean / d output| / sigma of each step, [T]; infinite where there is no likelihood.

        How steeply a step's log-likelihood depends on the network's output. Where it is large,
        rounding and the smallest change of the policy move the likelihood most.
        """
        return torch.where(self.sigma > 0, self.slope() / self.sigma, math.inf)

    def advance(self, step: Tensor, mean: Tensor, noise: Tensor) -> Tensor:
        """The next latent: mean + sigma noise."""
        return mean + per_sample(self.sigma, step, mean) * noise

    def log_prob(self, step: Tensor, x_next: Tensor, mean: Tensor) -> Tensor:
        """Gaussian log-density of the next latent, **averaged** over its dimensions: float [B].

        Averaging instead of summing is DDPO's convention, to which PPO's clip range of 1e-4 is
        tuned.
        """
        sigma = per_sample(self.sigma, step, mean)
        half_log = 0.5 * math.log(2 * math.pi)
        density = -((x_next - mean) ** 2) / (2 * sigma**2) - sigma.log() - half_log
        return density.mean(dim=tuple(range(1, mean.ndim)))

    def kl(self, step: Tensor, mean: Tensor, reference: Tensor) -> Tensor:
        """KL of two policies' steps, |mean - reference|^2 / 2 sigma^2, averaged likewise: [B]."""
        sigma = per_sample(self.sigma, step, mean)
        squared = (mean - reference) ** 2 / (2 * sigma**2)
        return squared.mean(dim=tuple(range(1, mean.ndim)))


def per_sample(values: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """`values[step]` for each sample, in the dtype and broadcast to the rank of `like`."""
    return values[step].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
