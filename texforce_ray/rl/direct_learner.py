"""Direct backpropagation through differentiable rewards: the paper's baselines. No Ray.

ReFL (Xu et al. 2023), DRaFT-K (Clark et al. 2024) and AlignProp (Prabhudesai et al. 2023) on the
same trajectories as PPO: the last steps are recomputed with gradient, from the stored latent and
the noise of the sample's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from texforce_ray import randomness
from texforce_ray.config import Config, DirectObjective
from texforce_ray.diffusion.denoiser import draw_noise
from texforce_ray.diffusion.process import Process
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.flops import PassFlops
from texforce_ray.rewards.differentiable import total_of
from texforce_ray.rl.learner import Learner
from texforce_ray.rl.precision import loss_scale
from texforce_ray.rl.sharding import UpdateBatch

# (images in [0, 1], float [B, 3, H, W]; B prompts) -> scores, float [B], with gradient.
DifferentiableScore = Callable[[Tensor, Sequence[str]], Tensor]


class DirectLearner(Learner):
    """Maximises a differentiable reward by its gradient; advantages are not used."""

    def __init__(
        self, backbone: Backbone, config: Config, reward: DifferentiableScore | None = None
    ) -> None:
        """`reward`: the total to maximise; default: the configured one, in this process."""
        super().__init__(backbone, config)
        assert config.direct is not None
        self.direct: DirectObjective = config.direct
        self.reward = reward or total_of(config.rewards, backbone.device.type)

    sums = ("count", "score", "squares", "passes")

    @staticmethod
    def kept_latents(
        config: Config, process: Process, iteration: int, first: int, count: int
    ) -> np.ndarray:
        """The latents before each of the last K steps: the gradient starts from one of them."""
        del iteration, first
        assert config.direct is not None
        keep = np.zeros((count, len(process) + 1), dtype=bool)
        keep[:, max(0, len(process) - config.direct.steps) : len(process)] = True
        return keep

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        count = max(1.0, sums["count"])
        mean = sums["score"] / count
        deviation = max(0.0, sums["squares"] / count - mean**2) ** 0.5
        return {
            "direct/reward": mean,
            "direct/reward_std": deviation,
            "direct/trained_images": int(sums["count"]),
            "direct/trained_pairs": int(sums["passes"]),
        }

    def update_flops(self, metrics: Mapping[str, float], cost: PassFlops) -> float:
        """Without the reward's."""
        passes = metrics["direct/trained_pairs"] * self.denoiser.passes
        return passes * cost.trained + metrics["direct/trained_images"] * cost.decoded

    def shard_gradient(
        self, batch: UpdateBatch, kept: np.ndarray, valid: int
    ) -> tuple[list[Tensor], dict[str, float]]:
        """Gradient of the negative reward; also the scores' count, sum and sum of squares."""
        scale = loss_scale(valid, self.backbone.latent_shape) * self.scale_factor
        first = first_step(self.direct, len(self.process), self.config.seed, self.updates)
        gradient, row = [torch.zeros_like(p) for p in self.parameters], np.zeros(4)
        # Activations of all steps with gradient are held at once, so a microbatch counts pairs.
        passes = 1 if self.direct.method == "refl" else len(self.process) - first
        images_at_once = max(1, self.microbatch_size // passes)
        for chunk in _chunks(kept - batch.first, images_at_once):
            with torch.enable_grad():
                images = self.images(batch.trajectory, chunk, first)
                score = self.reward(images, [batch.trajectory.prompts[row] for row in chunk])
                added = torch.autograd.grad(
                    # The reward may be in half precision, where the scale would overflow.
                    -score.float().sum() / valid * scale,
                    self.parameters,
                    allow_unused=True,
                )
            scores = score.detach().double()
            sums = float(scores.sum()), float(scores.square().sum())
            row += len(scores), *sums, passes * len(scores)
            pairs = zip(gradient, added, strict=True)
            gradient = [g if part is None else g + part / scale for g, part in pairs]
        return gradient, dict(zip(self.sums, row.tolist(), strict=True))

    def images(self, trajectory: Trajectory, rows: np.ndarray, first: int) -> Tensor:
        """Images of samples `rows` under the current policy, given their latents at step `first`.

        ReFL jumps to the image from there; the others denoise to the end. float [B, 3, H, W] in
        [0, 1], with gradient.
        """
        denoiser, process, device = self.denoiser, self.process, self.backbone.device
        ids = tuple(torch.from_numpy(part[rows]) for part in trajectory.prompt_ids)
        conditioning, prompt = denoiser.encode(ids)
        # In float32, so that the gradients of all steps add up in float32.
        prepared = denoiser.prepare(conditioning).map(lambda t: t.float())
        started = trajectory.latents_at(rows, np.full(len(rows), first))
        x = torch.from_numpy(started).to(device).float()
        if self.direct.method == "refl":
            step = torch.full((len(rows),), first, device=device)
            output = self._run(denoiser.output, step, x, prepared, prompt)
            return self.backbone.decode_pixels(process.x0(step, x, output))
        steps = len(process)
        _, noise = draw_noise(self.backbone, trajectory.seeds[rows], process)
        for index in range(first, steps):
            step = torch.full((len(rows),), index, device=device)
            mean = self._run(denoiser.mean, step, x, prepared, prompt)
            x = process.advance(step, mean, noise.get(index, torch.zeros_like(mean)))
        return self.backbone.decode_pixels(x)

    def _run(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self.direct.gradient_checkpointing:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


def first_step(direct: DirectObjective, steps: int, seed: int, update: int) -> int:
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
