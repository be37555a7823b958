"""DDIM as a Markov decision process: pure functions on tensors (Song et al. 2021, eqs. 12 and 16).

Operations follow the order of diffusers' `DDIMScheduler`, so that sampling here and in a stock
pipeline round alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class StepTable:
    """Coefficients of each of the T denoising steps, first step first.

    timesteps: int64 [T]; alpha, alpha_prev: cumulative products [T]; sigma: [T], standard
    deviation of the noise that the step adds. A step with sigma = 0 carries no likelihood.
    """

    timesteps: Tensor
    alpha: Tensor
    alpha_prev: Tensor
    sigma: Tensor
    prediction_type: str

    @property
    def trainable(self) -> list[int]:
        """Indices of the steps that carry a likelihood."""
        return [i for i, sigma in enumerate(self.sigma.tolist()) if sigma > 0]

    def to(self, device: torch.device) -> StepTable:
        return StepTable(
            self.timesteps.to(device),
            self.alpha.to(device),
            self.alpha_prev.to(device),
            self.sigma.to(device),
            self.prediction_type,
        )


def step_table(scheduler: DDIMScheduler, steps: int, eta: float) -> StepTable:
    """Coefficients of a `steps`-step process on a scheduler's noise schedule, in its dtype.

    sigma = eta * sqrt((1 - alpha_prev) / (1 - alpha)) * sqrt(1 - alpha / alpha_prev)
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {prediction_type!r}; one of {PREDICTION_TYPES}")
    scheduler.set_timesteps(steps)
    timesteps, alphas = scheduler.timesteps.cpu(), scheduler.alphas_cumprod
    previous = timesteps - scheduler.config.num_train_timesteps // steps
    final = scheduler.final_alpha_cumprod.to(alphas.dtype)
    alpha = alphas[timesteps]
    alpha_prev = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    sigma = eta * variance.clamp(min=0) ** 0.5
    return StepTable(timesteps, alpha, alpha_prev, sigma, prediction_type)


def _per_sample(values: Tensor, step: Tensor, like: Tensor) -> Tensor:
    return values[step].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def step_mean(table: StepTable, step: Tensor, x: Tensor, prediction: Tensor) -> Tensor:
    """Mean of p(x_prev | x_t): sqrt(alpha_prev) x0 + sqrt(1 - alpha_prev - sigma^2) eps.

    Args:
        step: index into the table for each sample, int64 [B].
        x: x_t, float [B, C, h, w].
        prediction: the model's output, same shape, meaning by `table.prediction_type`.
    """
    alpha_prev, sigma = _per_sample(table.alpha_prev, step, x), _per_sample(table.sigma, step, x)
    x0, epsilon = predicted(table, step, x, prediction)
    # Rounding makes it negative where alpha = 0 (zero terminal SNR) and eta = 1.
    direction = (1 - alpha_prev - sigma**2).clamp(min=0) ** 0.5 * epsilon
    return alpha_prev**0.5 * x0 + direction


def predicted(
    table: StepTable, step: Tensor, x: Tensor, prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """(x0, eps) that the model's output stands for; arguments and shapes as in `step_mean`."""
    alpha = _per_sample(table.alpha, step, x)
    beta = 1 - alpha
    if table.prediction_type == "epsilon":
        return (x - beta**0.5 * prediction) / alpha**0.5, prediction
    if table.prediction_type == "sample":
        return prediction, (x - alpha**0.5 * prediction) / beta**0.5
    x0 = (alpha**0.5) * x - (beta**0.5) * prediction
    return x0, (alpha**0.5) * prediction + (beta**0.5) * x


def add_noise(table: StepTable, step: Tensor, mean: Tensor, noise: Tensor) -> Tensor:
    """x_prev = mean + sigma * noise, shapes as in `step_mean`."""
    return mean + _per_sample(table.sigma, step, mean) * noise


def log_prob(table: StepTable, step: Tensor, x_prev: Tensor, mean: Tensor) -> Tensor:
    """Gaussian log-density of `x_prev`, **averaged** over latent dimensions: float [B].

    The mean instead of the sum is DDPO's convention, to which PPO's clip range of 1e-4 is tuned.
    """
    sigma = _per_sample(table.sigma, step, mean)
    density = -((x_prev - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.mean(dim=tuple(range(1, mean.ndim)))


def step_kl(table: StepTable, step: Tensor, mean: Tensor, reference: Tensor) -> Tensor:
    """KL of two steps of equal sigma, |mean - reference|^2 / 2 sigma^2, averaged likewise: [B]."""
    sigma = _per_sample(table.sigma, step, mean)
    squared = (mean - reference) ** 2 / (2 * sigma**2)
    return squared.mean(dim=tuple(range(1, mean.ndim)))


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, in diffusers' parametrisation)."""
    return unconditional + scale * (conditional - unconditional)
