"""What PPO's ratios are measured against, and the loss of (sample, step) pairs beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from texforce_ray.config import PpoObjective
from texforce_ray.diffusion.denoiser import draw_noise
from texforce_ray.diffusion.process import Process, per_sample
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.model.transfer import to_device
from texforce_ray.rl import ppo
from texforce_ray.rl.likelihood import Likelihood, Pairs

Means = dict[tuple[int, int], Tensor]  # by (row, step): [C, h, w] each, on the CPU


@dataclass(frozen=True)
class Anchor:
    """The policy that ratios refer to: the one that sampled, or decoupled PPO's proximal one.

    log_probs, weight: float32 [n, T], of all n samples of a learner; weight is decoupled PPO's.
    means: its means at the trained pairs; empty if it sampled itself, for then they follow from
    the samples and their noise.
    """

    log_probs: Tensor
    weight: Tensor
    means: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(log_probs: np.ndarray | Tensor) -> Anchor:
        """The policy that sampled, with a weight of 1 for every pair."""
        values = torch.as_tensor(log_probs)
        return Anchor(values, torch.ones_like(values))

    def mean(self, likelihood: Likelihood, trajectory: Trajectory, part: Pairs) -> Tensor:
        """The anchor's mean at each pair: float32 [P, C, h, w]."""
        device = likelihood.denoiser.device
        if self.means:
            found = zip(part.sample.tolist(), part.step.tolist(), strict=True)
            return to_device(torch.stack([self.means[pair] for pair in found]), device)
        return sampled_means(likelihood, trajectory, part)


def sampled_means(likelihood: Likelihood, trajectory: Trajectory, part: Pairs) -> Tensor:
    """Means of the policy that sampled, x_next - sigma noise, in float32: [P, C, h, w].

    The noise is drawn again from the samples' seeds, so that trajectories need not store means.
    """
    denoiser, process = likelihood.denoiser, likelihood.denoiser.process
    rows, local = np.unique(part.sample, return_inverse=True)
    _, drawn = draw_noise(denoiser.backbone, trajectory.seeds[rows], process)
    noise = torch.stack([drawn[step][i] for step, i in zip(part.step.tolist(), local, strict=True)])
    step = to_device(part.step, denoiser.device)
    following = likelihood.latents(trajectory, part.sample, part.step + 1).float()
    return following - per_sample(process.sigma, step, following) * noise


def level_weights(objective: PpoObjective, process: Process, steps: np.ndarray) -> Tensor | None:
    """Each step's weight in the loss, [T], 1 on average over `steps`; None: all are equal."""
    if objective.level == "none":
        return None
    # GRPO-Guard divides by the time step -dt, which is what a step of the flow makes of the
    # network's output.
    raw = process.sigma if objective.level == "tempflow" else 1 / process.slope()
    return raw / raw[torch.from_numpy(steps).to(raw.device)].mean()


def surrogate(
    objective: PpoObjective,
    log_prob: Tensor,
    anchor_log_prob: Tensor,
    advantage: Tensor,
    sigma: Tensor,
    weight: Tensor | None,
    divergence: Tensor | None,
) -> ppo.PpoLoss:
    """The configured loss of P pairs, by `objective.level` and `objective.trust`.

    Args:
        objective: which one.
        log_prob, anchor_log_prob, advantage: float [P].
        sigma: standard deviation of each pair's step, [P].
        weight: of each pair, [P].
        divergence: the KL of each pair to the anchor's step, [P]; where `objective.needs_means`.
    """
    if objective.level == "guard":
        assert divergence is not None
        log_prob = ppo.levelled_log_ratio(log_prob - anchor_log_prob, divergence, sigma)
        anchor_log_prob = torch.zeros_like(log_prob)
    if objective.trust == "clip":
        return ppo.clipped_loss(log_prob, anchor_log_prob, advantage, objective.clip_range, weight)
    assert divergence is not None
    return ppo.masked_loss(
        log_prob, anchor_log_prob, advantage, divergence.detach(), objective.trust_kl, weight
    )
