"""PPO on denoising steps: pure functions, one value per (sample, timestep)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PpoLoss:
    """loss: float [B], to be summed and divided by the global count; the rest is detached."""

    loss: Tensor
    ratio: Tensor
    approx_kl: Tensor
    clipped: Tensor


def clipped_loss(
    log_prob: Tensor,
    anchor_log_prob: Tensor,
    advantage: Tensor,
    clip_range: float,
    weight: Tensor | None = None,
) -> PpoLoss:
    """-w * min(r A, clip(r, 1 - lambda, 1 + lambda) A), r = exp(log_prob - anchor_log_prob).

    The anchor is the behaviour policy in plain PPO (TexForce eq. 6), and the proximal policy in
    decoupled PPO (Hilton et al. 2022), with w = `behaviour_weight`. All arguments are float [B];
    gradient flows through `log_prob` alone.

    approx_kl is Schulman's estimator (r - 1) - log r, which is never negative.
    """
    log_ratio = log_prob - anchor_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if weight is not None:
        loss = loss * weight
    return _with_statistics(loss, log_ratio, (ratio - 1).abs() > clip_range)


def masked_loss(
    log_prob: Tensor,
    anchor_log_prob: Tensor,
    advantage: Tensor,
    divergence: Tensor,
    trust_kl: float,
    weight: Tensor | None = None,
) -> PpoLoss:
    """-w r A without clipping; 0 for pairs that have left the trust region (Flow-DPPO).

    A pair has left it if `divergence`, the KL to the anchor's step (`Process.kl`, float [B]), is at
    least `trust_kl` and the ratio has already moved the advantage's way.
    """
    log_ratio = log_prob - anchor_log_prob
    loss = -log_ratio.exp() * advantage
    if weight is not None:
        loss = loss * weight
    left = (divergence >= trust_kl) & (log_ratio * advantage > 0)
    return _with_statistics(torch.where(left, torch.zeros_like(loss), loss), log_ratio, left)


def levelled_log_ratio(log_ratio: Tensor, divergence: Tensor, sigma: Tensor) -> Tensor:
    """(log r + KL) sigma, whose spread does not depend on the step's noise (GRPO-Guard).

    For a Gaussian step with x' = mean_old + sigma eps it is eps (mean - mean_old), averaged over
    dimensions: linear in the means. All float [B]; divergence: the KL to the old policy's step.
    """
    return (log_ratio + divergence) * sigma


def _with_statistics(loss: Tensor, log_ratio: Tensor, outside: Tensor) -> PpoLoss:
    with torch.no_grad():
        approx_kl = torch.expm1(log_ratio) - log_ratio
    return PpoLoss(loss, log_ratio.detach().exp(), approx_kl, outside.float())


def behaviour_weight(prox_log_prob: Tensor, behaviour_log_prob: Tensor, cap: float) -> Tensor:
    """w = min(pi_prox / pi_behaviour, c) of decoupled PPO: float [B]."""
    return (prox_log_prob - behaviour_log_prob).exp().clamp(max=cap)


def ratio_error(log_prob: Tensor, behaviour_log_prob: Tensor) -> float:
    """max |r - 1|: how far learner and sampler disagree about the same weights; 0 without pairs."""
    if not log_prob.numel():
        return 0.0
    return float(torch.expm1(log_prob - behaviour_log_prob).abs().max())
