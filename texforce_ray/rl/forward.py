"""Maths of the objectives on the forward process. Pure functions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from texforce_ray.config import NftObjective

_LEAST_WIDTH = 1e-5


def exponential_weights(
    advantages: np.ndarray, mask: np.ndarray, group: int, temperature: float
) -> np.ndarray:
    """exp(A / temperature), normalised to mean 1 over the unmasked samples of each group.

    Reward-weighted regression (Peters & Schaal 2007; for diffusion, Lee et al. 2023, eq. 4).

    Args:
        advantages: float64 [N], consecutive samples of a prompt form a group.
        mask: bool [N], True: use.
        group: samples in a group; divides N.
        temperature: the higher, the more equal the weights.

    Returns:
        float64 [N], 0 where masked.
    """
    shape = (-1, group)
    used = mask.reshape(shape)
    scaled = np.where(used, advantages.reshape(shape) / temperature, -np.inf)
    highest = scaled.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(scaled - np.where(np.isfinite(highest), highest, 0.0))
    return _mean_one(weights, used)


def best_weights(advantages: np.ndarray, mask: np.ndarray, group: int, best: int) -> np.ndarray:
    """Equal weights for the `best` unmasked samples of each group, of mean 1 over the group.

    RAFT (Dong et al. 2023). Of equal advantages the earlier sample counts as better.

    Returns:
        float64 [N], 0 for all others.
    """
    shape = (-1, group)
    used = mask.reshape(shape)
    order = np.argsort(np.where(used, -advantages.reshape(shape), np.inf), axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    return _mean_one(((rank < best) & used).astype(np.float64), used)


def nft_probability(advantages: np.ndarray, largest: float) -> np.ndarray:
    """r = clip(1/2 + A / (2 A_max), 0, 1): how good each sample is, float64 [N]."""
    return np.clip(0.5 + 0.5 * advantages / largest, 0.0, 1.0)


def nft_loss(
    x0: Tensor, old_x0: Tensor, clean: Tensor, probability: Tensor, objective: NftObjective
) -> Tensor:
    """DiffusionNFT's loss of P noised samples (Zheng et al. 2025), in terms of x0: float [P].

    A_max (r |x0+ - clean|^2 / (beta w+) + (1 - r) |x0- - clean|^2 / (beta w-)), where x0+ = old +
    beta (x0 - old), x0- = old - beta (x0 - old), and w is the mean of |x0+- - clean|, without
    gradient.

    Args:
        x0, old_x0: clean latents that the trained and the old policy predict, float [P, C, h, w].
        clean: the finished samples.
        probability: r, float [P].
        objective: beta and A_max.
    """
    change = objective.beta * (x0 - old_x0)
    dimensions = tuple(range(1, x0.ndim))
    losses = []
    for implicit, share in ((old_x0 + change, probability), (old_x0 - change, 1 - probability)):
        away = implicit - clean
        with torch.no_grad():
            width = away.abs().mean(dim=dimensions).clamp(min=_LEAST_WIDTH)
        losses.append(share * away.square().mean(dim=dimensions) / width)
    return objective.advantage_max / objective.beta * (losses[0] + losses[1])


def old_decay(iteration: int, objective: NftObjective) -> float:
    """d of old <- d old + (1 - d) trained after `iteration` iterations."""
    late = max(0, iteration - objective.old_start)
    return min(objective.old_rate * late, objective.old_decay_max)


def _mean_one(weights: np.ndarray, used: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=1, keepdims=True)
    count = used.sum(axis=1, keepdims=True)
    return (weights * count / np.where(total > 0, total, 1.0)).reshape(-1)
