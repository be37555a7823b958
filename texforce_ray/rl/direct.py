"""Direct backpropagation of differentiable rewards: the comparisons that the paper draws. No Ray.

ReFL (Xu et al. 2023), DRaFT-K (Clark et al. 2024) and AlignProp (Prabhudesai et al. 2023) on the
same trajectories as PPO: the last steps are computed once more, with gradient, from the stored
latent and the noise that the sample's seed gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from texforce_ray import randomness
from texforce_ray.config import Config, DirectConfig
from texforce_ray.diffusion import ddim
from texforce_ray.diffusion.sampler import (
    draw_noise,
    encode_distinct,
    policy_mean,
    policy_output,
)
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.snapshot import PolicySnapshot
from texforce_ray.rl.precision import loss_scale
from texforce_ray.rl.trainer import Trainer, UpdateBatch

_PROBED = 2  # samples whose gradient is checked in half precision

# Images in [0, 1], float [B, 3, H, W], and B prompts to scores, float [B], with gradient.
DifferentiableScore = Callable[[Tensor, Sequence[str]], Tensor]


class DirectLearner(Trainer):
    """Raises a differentiable reward by its gradient; advantages play no part."""

    def __init__(self, backbone: Backbone, config: Config, reward: DifferentiableScore) -> None:
        """`reward` is the total that is raised: see `rewards.base.differentiable_total`."""
        super().__init__(backbone, config)
        assert config.direct is not None
        self.direct: DirectConfig = config.direct
        self.reward = reward

    def update(self, batch: UpdateBatch, behaviour: PolicySnapshot | None = None) -> dict:
        del behaviour  # the gradient is that of the current policy, whoever drew the start
        sums: list[list[list[float]]] = []
        norms: list[float] = []
        some = self._minibatches(batch, 0)
        first = next((rows for rows in some if batch.mask[rows].any()), some[0])
        checked = self.check_gradient(batch, lambda: self._probe(batch, first))
        for epoch in range(self.config.ppo.epochs):
            for rows in self._minibatches(batch, epoch):
                if not batch.mask[rows].any():
                    self._pass_over()
                    continue
                sums.append([])
                norms.append(self._step(batch, rows, sums[-1]))
        self.version += 1
        # Count, sum and sum of squares of the scores, of every shard of every minibatch.
        count, total, squares = sum(
            (self._gathered(shards).sum(axis=0) for shards in sums), start=np.zeros(3)
        )
        mean = total / max(1.0, count)
        return {
            "direct/reward": mean,
            "direct/reward_std": max(0.0, squares / max(1.0, count) - mean**2) ** 0.5,
            **self._norm_metrics(norms),
            **checked,
            **self._rates(),
        }

    def _step(self, batch: UpdateBatch, rows: np.ndarray, sums: list[list[float]]) -> float:
        """One optimizer update on the samples `rows`; adds a row to `sums` for each own shard."""
        valid = int(batch.mask[rows].sum())
        parts = []
        for shard in self._shards(rows):
            gradient, row = self._shard_gradient(batch, shard[batch.mask[shard]], valid)
            parts.append(gradient)
            sums.append(row.tolist())
        return self._apply(self._gradient(parts))

    def _shard_gradient(
        self, batch: UpdateBatch, kept: np.ndarray, valid: int
    ) -> tuple[list[Tensor], np.ndarray]:
        """Gradient over samples `kept`, divided by `valid`; their scores' count, sum and squares.

        The second: float64 [3].
        """
        scale = loss_scale(valid, self.backbone.latent_shape) * self.scale_factor
        first = first_step(self.direct, len(self.table.timesteps), self.config.seed, self.updates)
        gradient, row = [torch.zeros_like(p) for p in self.parameters], np.zeros(3)
        # The activations of all steps with gradient are held at once: a microbatch counts pairs.
        passes = 1 if self.direct.method == "refl" else len(self.table.timesteps) - first
        images_at_once = max(1, self.microbatch_size // passes)
        for chunk in _chunks(kept - batch.first, images_at_once):
            with torch.enable_grad():
                images = self.images(batch.trajectory, chunk, first)
                score = self.reward(images, [batch.trajectory.prompts[row] for row in chunk])
                found = torch.autograd.grad(
                    # A reward may answer in half precision, in which the scale is infinite.
                    -score.float().sum() / valid * scale,
                    self.parameters,
                    allow_unused=True,
                )
            scores = score.detach().double()
            row += len(scores), float(scores.sum()), float(scores.square().sum())
            pairs = zip(gradient, found, strict=True)
            gradient = [g if part is None else g + part / scale for g, part in pairs]
        return gradient, row

    def _probe(self, batch: UpdateBatch, rows: np.ndarray) -> list[Tensor]:
        """The gradient of a few of this learner's samples: what `check_gradient` compares."""
        kept = np.concatenate(self._shards(rows))
        kept = kept[batch.mask[kept]][:_PROBED]
        return self._shard_gradient(batch, kept, int(batch.mask[rows].sum()))[0]

    def images(self, trajectory: Trajectory, rows: np.ndarray, first: int) -> Tensor:
        """Images of samples `rows` under the current policy, given their latents at step `first`.

        ReFL leaps to the image from there; the others denoise to the end. float [B, 3, H, W] in
        [0, 1], with gradient.
        """
        backbone, device = self.backbone, self.backbone.device
        ids = tuple(torch.from_numpy(part[rows]) for part in trajectory.prompt_ids)
        scale = self.config.diffusion.guidance_scale
        conditioning, prompt = encode_distinct(backbone, ids, scale)
        # In float32, so that the gradients of all steps add up in float32.
        prepared = backbone.prepare(conditioning).map(lambda t: t.float())
        given = (prepared, prompt, scale)
        x = torch.from_numpy(trajectory.latents[rows, first]).to(device).float()
        if self.direct.method == "refl":
            step = torch.full((len(rows),), first, device=device)
            output = self._run(policy_output, step, x, *given)
            x, _ = ddim.predicted(self.table, step, x, output)
            return backbone.decode_pixels(x)
        steps = len(self.table.timesteps)
        _, *noise = draw_noise(backbone, trajectory.seeds[rows], steps)
        for index in range(first, steps):
            step = torch.full((len(rows),), index, device=device)
            mean = self._run(policy_mean, step, x, *given)
            x = ddim.add_noise(self.table, step, mean, noise[index])
        return backbone.decode_pixels(x)

    def _run(self, function: Callable[..., Tensor], *given: Any) -> Tensor:
        given = (self.backbone, self.table, *given)
        if self.direct.gradient_checkpointing:
            return checkpoint(function, *given, use_reentrant=False)
        return function(*given)


def first_step(direct: DirectConfig, steps: int, seed: int, update: int) -> int:
    """The denoising step from which an update's gradient is computed.

    ReFL and AlignProp draw it for each update; DRaFT-K always takes the last K.
    """
    longest = min(direct.steps, steps)
    if direct.method == "draft":
        return steps - longest
    rng = randomness.generator(seed, randomness.TRUNCATION, update)
    return steps - int(rng.integers(1, longest + 1))


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]
