"""DDIM as a Markov decision process (Song et al. 2021, eqs. 12 and 16).

Operations follow the order of diffusers' `DDIMScheduler`, so that sampling rounds exactly as in a
stock pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from texforce_ray.diffusion.process import Process, per_sample

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Ddim(Process):
    """alpha, alpha_prev: cumulative products before and after each step, [T]."""

    timesteps: Tensor
    alpha: Tensor
    alpha_prev: Tensor
    sigma: Tensor
    prediction_type: str
    init_noise_sigma: float = 1.0

    @staticmethod
    def of(scheduler: DDIMScheduler, steps: int, eta: float) -> Ddim:
        """A `steps`-step process on a scheduler's noise schedule, in its dtype.

        sigma = eta * sqrt((1 - alpha_prev) / (1 - alpha)) * sqrt(1 - alpha / alpha_prev)
        """
        prediction_type = scheduler.config.prediction_type
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r} is not in {PREDICTION_TYPES}")
        scheduler.set_timesteps(steps)
        timesteps, alphas = scheduler.timesteps.cpu(), scheduler.alphas_cumprod
        previous = timesteps - scheduler.config.num_train_timesteps // steps
        final = scheduler.final_alpha_cumprod.to(alphas.dtype)
        alpha = alphas[timesteps]
        alpha_prev = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)
        variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
        sigma = eta * variance.clamp(min=0) ** 0.5
        first = float(scheduler.init_noise_sigma)
        return Ddim(timesteps, alpha, alpha_prev, sigma, prediction_type, first)

    def to(self, device: torch.device) -> Ddim:
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            alpha=self.alpha.to(device),
            alpha_prev=self.alpha_prev.to(device),
            sigma=self.sigma.to(device),
        )

    def start(self, noise: Tensor) -> Tensor:
        return noise * self.init_noise_sigma

    def x0(self, step: Tensor, x: Tensor, output: Tensor) -> Tensor:
        return self._predicted(step, x, output)[0]

    def mean(self, step: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """sqrt(alpha_prev) x0 + sqrt(1 - alpha_prev - sigma^2) eps."""
        alpha_prev, sigma = (per_sample(v, step, x) for v in (self.alpha_prev, self.sigma))
        x0, epsilon = self._predicted(step, x, output)
        # Rounding can make it negative where alpha = 0 (zero terminal SNR) and eta = 1.
        direction = (1 - alpha_prev - sigma**2).clamp(min=0) ** 0.5 * epsilon
        return alpha_prev**0.5 * x0 + direction

    def forward(self, step: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        alpha = per_sample(self.alpha, step, x0)
        return alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise

    def target(self, step: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        alpha = per_sample(self.alpha, step, x0)
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        return alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0

    def _predicted(self, step: Tensor, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) that the network's output stands for."""
        alpha = per_sample(self.alpha, step, x)
        beta = 1 - alpha
        if self.prediction_type == "epsilon":
            return (x - beta**0.5 * output) / alpha**0.5, output
        if self.prediction_type == "sample":
            return output, (x - alpha**0.5 * output) / beta**0.5
        x0 = (alpha**0.5) * x - (beta**0.5) * output
        return x0, (alpha**0.5) * output + (beta**0.5) * x
