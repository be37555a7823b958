"""A linear-Gaussian policy of 256 weights, trained by Adam on the policy gradient. numpy only.

x_t+1 = x_t + PULL (features(prompt) W - x_t) + SIGMA noise: a test can check it by hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from texforce_ray.artifacts.snapshot import (
    Learned,
    LearnerState,
    LoraShape,
    PolicySnapshot,
    Tensors,
)
from texforce_ray.diffusion.trajectory import Trajectory

PART, WEIGHTS = "text_encoder", "weights"
FEATURES, LIVE = 32, 8  # W is [FEATURES, LIVE]; LIVE entries of each latent and image are used
PULL, SIGMA = 0.2, 0.3
CAP = 2.0  # limits the importance weight of a sample that another policy drew


def features(prompts: Sequence[str]) -> np.ndarray:
    """Fixed features of each prompt: float64 [B, FEATURES], about unit length."""
    digests = [hashlib.sha256(prompt.encode()).digest() for prompt in prompts]
    numbers = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), FEATURES)
    return (numbers / 127.5 - 1) / FEATURES**0.5


def draw(
    weights: np.ndarray, prompts: Sequence[str], seeds: np.ndarray, steps: int, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, T + 1, LIVE] in the storage dtype, log-probabilities float32 [B, T]."""
    goal = np.einsum("bf,fd->bd", features(prompts), weights)
    noise = np.stack([np.random.default_rng(s).standard_normal((steps + 1, LIVE)) for s in seeds])
    latents = np.empty((len(seeds), steps + 1, LIVE), dtype)
    latents[:, 0] = noise[:, 0]
    for t in range(steps):  # each step starts from the stored value, which the learner sees
        x = latents[:, t].astype(np.float64)
        latents[:, t + 1] = x + PULL * (goal - x) + SIGMA * noise[:, t + 1]
    return latents, log_probs(residuals(weights, prompts, latents))


def residuals(weights: np.ndarray, prompts: Sequence[str], latents: np.ndarray) -> np.ndarray:
    """What each step added beyond the policy's mean: float64 [B, T, LIVE]."""
    x = latents.astype(np.float64)
    goal = np.einsum("bf,fd->bd", features(prompts), weights)[:, None]
    return x[:, 1:] - x[:, :-1] - PULL * (goal - x[:, :-1])


def log_probs(difference: np.ndarray) -> np.ndarray:
    """Mean over the latent's entries, up to a constant: float32 [B, T]."""
    return (-(difference**2).mean(axis=2) / (2 * SIGMA**2)).astype(np.float32)


def paint(latents: np.ndarray) -> np.ndarray:
    """The image's live pixels, uint8 [B, LIVE], from the last latents [B, LIVE]."""
    return np.round(255 / (1 + np.exp(-latents.astype(np.float64)))).astype(np.uint8)


def learn(
    learned: Learned,
    trajectory: Trajectory,
    advantages: np.ndarray,
    mask: np.ndarray,
    lr: float,
) -> tuple[dict[str, float], Learned]:
    """One Adam step on the importance-weighted policy gradient; inputs are not modified."""
    state, adapter = learned.state, learned.snapshot.adapters[PART]
    weights = adapter[WEIGHTS].astype(np.float64)
    live = trajectory.latents.reshape(*trajectory.latents.shape[:2], -1)[:, :, :LIVE]
    difference = residuals(weights, trajectory.prompts, live)
    change = (log_probs(difference) - trajectory.log_probs).mean(axis=1, dtype=np.float64)
    factor = np.where(mask, advantages * np.minimum(np.exp(change), CAP), 0.0)
    slope = difference.mean(axis=1) * PULL / SIGMA**2
    gradient = -np.einsum("b,bf,bd->fd", factor, features(trajectory.prompts), slope)
    gradient /= max(1, int(mask.sum()))
    step = state.updates + 1
    first = 0.9 * state.optimizer["0/exp_avg"] + 0.1 * gradient
    second = 0.999 * state.optimizer["0/exp_avg_sq"] + 0.001 * gradient**2
    scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
    weights = weights - lr * first / (1 - 0.9**step) / scale
    metrics = {
        "ppo/ratio_error_first_pass": float(np.abs(np.expm1(change)).max()),
        "learner/grad_norm": float(np.sqrt((gradient**2).sum())),
    }
    size = adapter["ballast"].size
    return metrics, _learned(state.version + 1, step, weights, first, second, size)


def fresh(ballast_bytes: int) -> Learned:
    """Version 0."""
    zeros = np.zeros((FEATURES, LIVE))
    return _learned(0, 0, zeros, zeros, zeros, ballast_bytes // 4)


def _learned(
    version: int,
    updates: int,
    weights: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    size: int,
) -> Learned:
    optimizer: Tensors = {"0/exp_avg": first, "0/exp_avg_sq": second}
    optimizer |= {f"1/{key}": ballast(size, updates) for key in ("exp_avg", "exp_avg_sq")}
    adapter = {WEIGHTS: weights.astype(np.float32), "ballast": ballast(size, version)}
    snapshot = PolicySnapshot(version, {PART: LoraShape(1, 1.0, (WEIGHTS,))}, {PART: adapter})
    return Learned(snapshot, LearnerState(version, updates, optimizer), None)


def ballast(size: int, value: int) -> np.ndarray:
    return np.full(size, value, np.float32)
