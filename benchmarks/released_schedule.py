"""The released trainer's order of work, for comparison alone: the same maths, one thing at a time.

Samples and minibatches of four; one timestep after the other; prompt and empty prompt encoded again
at each of them; images scored one by one; no phase overlaps another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from texforce_ray import randomness
from texforce_ray.diffusion import ddim
from texforce_ray.diffusion.sampler import draw_noise
from texforce_ray.diffusion.trajectory import Trajectory, concatenate
from texforce_ray.model.backbone import DTYPES, Backbone
from texforce_ray.model.conditioning import Conditioning
from texforce_ray.rl import ppo
from texforce_ray.rl.learner import Learner
from texforce_ray.rl.trainer import UpdateBatch

BATCH = 4


class ReleasedSchedule:
    """Samples, scores and trains on the adapter of a `Learner`, in the released order."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.config = learner, learner.config
        self.backbone: Backbone = learner.backbone
        self.table = learner.table
        self.scale = learner.config.diffusion.guidance_scale
        self.storage = DTYPES[learner.config.diffusion.storage_dtype]

    def _mean(self, ids: Sequence[Tensor], x: Tensor, step: Tensor) -> Tensor:
        """Encode both prompts, predict, guide: all of it at each call."""
        backbone, timesteps = self.backbone, self.table.timesteps[step]
        conditioning = backbone.encode(ids)
        if self.scale <= 1:
            output = backbone.predict(x, timesteps, conditioning).float()
            return ddim.step_mean(self.table, step, x, output)
        empty = backbone.encode(backbone.tokenize([""] * len(x)).ids)
        output = backbone.predict(
            torch.cat([x, x]),
            torch.cat([timesteps, timesteps]),
            Conditioning.cat([empty, conditioning]),
        )
        unconditional, conditional = output.float().chunk(2)
        guided = ddim.guide(unconditional, conditional, self.scale)
        return ddim.step_mean(self.table, step, x, guided)

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
        backbone, table = self.backbone, self.table
        ids = backbone.tokenize(prompts).ids
        # In sampling, the pipeline encodes once for each batch.
        conditioning = backbone.encode(ids)
        if self.scale > 1:
            empty = backbone.encode(backbone.tokenize([""] * len(prompts)).ids)
            conditioning = Conditioning.cat([empty, conditioning])
        start, *noise = draw_noise(backbone, seeds, len(table.timesteps))
        x = (start * backbone.init_noise_sigma).to(self.storage).float()
        latents, log_probs = [x], []
        for index in range(len(table.timesteps)):
            step = torch.full((len(prompts),), index, device=x.device)
            timesteps = table.timesteps[step]
            if self.scale > 1:
                output = backbone.predict(
                    torch.cat([x, x]), torch.cat([timesteps, timesteps]), conditioning
                )
                output = ddim.guide(*output.float().chunk(2), self.scale)
            else:
                output = backbone.predict(x, timesteps, conditioning).float()
            mean = ddim.step_mean(table, step, x, output)
            x = ddim.add_noise(table, step, mean, noise[index]).to(self.storage).float()
            latents.append(x)
            log_probs.append(ddim.log_prob(table, step, x, mean))
        trajectory = Trajectory(
            prompt_ids=tuple(part.numpy() for part in ids),
            latents=torch.stack(latents, 1).to(self.storage).cpu().numpy(),
            timesteps=table.timesteps.cpu().numpy(),
            log_probs=torch.stack(log_probs, 1).cpu().numpy(),
            prompts=tuple(prompts),
            seeds=np.asarray(seeds),
            policy_version=0,
        )
        return trajectory, backbone.decode(x)

    def update(self, batch: UpdateBatch) -> None:
        """All epochs and minibatches of one iteration, those of the learner."""
        config, learner = self.config, self.learner
        steps = randomness.trained_steps(
            config.seed,
            learner.version,
            len(batch),
            learner._trainable_steps(),
            config.trained_timesteps,
        )
        for epoch in range(config.ppo.epochs):
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
                        ddim.log_prob(self.table, step, following, mean),
                        torch.from_numpy(trajectory.log_probs[four, index]).to(device),
                        torch.from_numpy(batch.advantages[four]).float().to(device),
                        self.config.ppo.clip_range,
                    )
                    (result.loss.sum() / valid).backward()
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learner.parameters
        ]
