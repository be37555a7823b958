"""The released trainer's order of work, for comparison alone: the same maths, one thing at a time.

Samples and minibatches of four; one timestep after the other; prompt and empty prompt encoded again
at each of them; images scored one by one; no phase overlaps another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from texforce_ray.diffusion.denoiser import draw_noise
from texforce_ray.diffusion.trajectory import Trajectory, concatenate
from texforce_ray.model.backbone import DTYPES, Backbone
from texforce_ray.model.conditioning import Conditioning
from texforce_ray.rl import ppo
from texforce_ray.rl.ppo_learner import PpoLearner, trained_steps
from texforce_ray.rl.sharding import UpdateBatch

BATCH = 4


class ReleasedSchedule:
    """Samples, scores and trains on the adapter of a `PpoLearner`, in the released order."""

    def __init__(self, learner: PpoLearner) -> None:
        self.learner, self.config = learner, learner.config
        self.backbone: Backbone = learner.backbone
        self.process = learner.process
        self.scale = learner.config.diffusion.guidance_scale
        self.storage = DTYPES[learner.config.diffusion.storage_dtype]

    def _mean(self, ids: Sequence[Tensor], x: Tensor, step: Tensor) -> Tensor:
        """Encode both prompts, predict, guide: all of it at each call."""
        backbone, timesteps = self.backbone, self.process.timesteps[step]
        conditioning = backbone.encode(ids)
        if self.scale <= 1:
            output = backbone.predict(x, timesteps, conditioning).float()
            return self.process.mean(step, x, output)
        empty = backbone.encode(backbone.tokenize([""] * len(x)).ids)
        output = backbone.predict(
            torch.cat([x, x]),
            torch.cat([timesteps, timesteps]),
            Conditioning.cat([empty, conditioning]),
        )
        unconditional, conditional = output.float().chunk(2)
        guided = self.backbone.guide(unconditional, conditional, self.scale)
        return self.process.mean(step, x, guided)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: np.ndarray) -> tuple[Trajectory, np.ndarray]:
        """Trajectories and images (uint8 [B, H, W, 3]) in batches of four."""
        parts, images = [], []
        for first in range(0, len(prompts), BATCH):
            rows = slice(first, first + BATCH)
            trajectory, drawn = self._sample(prompts[rows], seeds[rows])
            parts.append(trajectory)
            images.append(drawn)
        return concatenate(parts), np.concatenate(images)

    def _sample(self, prompts: Sequence[str], seeds: np.ndarray) -> tuple[Trajectory, np.ndarray]:
        backbone, process = self.backbone, self.process
        ids = backbone.tokenize(prompts).ids
        # In sampling, the pipeline encodes once for each batch.
        conditioning = backbone.encode(ids)
        if self.scale > 1:
            empty = backbone.encode(backbone.tokenize([""] * len(prompts)).ids)
            conditioning = Conditioning.cat([empty, conditioning])
        start, noise = draw_noise(backbone, seeds, process)
        x = process.start(start).to(self.storage).float()
        latents, log_probs = [x], []
        for index in range(len(process)):
            step = torch.full((len(prompts),), index, device=x.device)
            timesteps = process.timesteps[step]
            if self.scale > 1:
                output = backbone.predict(
                    torch.cat([x, x]), torch.cat([timesteps, timesteps]), conditioning
                )
                output = backbone.guide(*output.float().chunk(2), self.scale)
            else:
                output = backbone.predict(x, timesteps, conditioning).float()
            mean = process.mean(step, x, output)
            x = process.advance(step, mean, noise[index]).to(self.storage).float()
            latents.append(x)
            log_probs.append(process.log_prob(step, x, mean))
        trajectory = Trajectory(
            prompt_ids=tuple(part.numpy() for part in ids),
            latents=torch.stack(latents, 1).to(self.storage).cpu().numpy(),
            slots=np.tile(np.arange(len(latents)), (len(prompts), 1)),
            timesteps=process.timesteps.cpu().numpy(),
            log_probs=torch.stack(log_probs, 1).cpu().numpy(),
            prompts=tuple(prompts),
            seeds=np.asarray(seeds),
            policy_version=0,
        )
        return trajectory, backbone.decode(x).cpu().numpy()

    def update(self, batch: UpdateBatch) -> None:
        """All epochs and minibatches of one iteration, those of the learner."""
        config, learner = self.config, self.learner
        steps = trained_steps(config, learner.process, learner.version, len(batch))
        for epoch in range(config.update.epochs):
            for rows in learner._minibatches(batch, epoch):
                learner._apply(self.gradient(batch, rows, steps))
        learner.version += 1

    def gradient(self, batch: UpdateBatch, rows: np.ndarray, steps: np.ndarray) -> list[Tensor]:
        """Of the loss over the samples `rows`, gathered by autograd over all backward passes."""
        learner, trajectory, device = self.learner, batch.trajectory, self.backbone.device
        for parameter in learner.parameters:
            parameter.grad = None
        valid = int(batch.mask[rows].sum()) * steps.shape[1]
        kept = rows[batch.mask[rows]]
        for first in range(0, len(kept), BATCH):
            four = kept[first : first + BATCH]
            ids = [torch.from_numpy(part[four]) for part in trajectory.prompt_ids]
            for column in range(steps.shape[1]):
                index = steps[four, column]
                step = torch.from_numpy(index).to(device)
                x, following = (
                    torch.from_numpy(trajectory.latents[four, index + offset]).to(device).float()
                    for offset in (0, 1)
                )
                with torch.enable_grad():
                    mean = self._mean(ids, x, step)
                    result = ppo.clipped_loss(
                        self.process.log_prob(step, following, mean),
                        torch.from_numpy(trajectory.log_probs[four, index]).to(device),
                        torch.from_numpy(batch.advantages[four]).float().to(device),
                        self.config.ppo.clip_range,
                    )
                    (result.loss.sum() / valid).backward()
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learner.parameters
        ]
