"""Your own objective: reward-weighted regression (Lee et al. 2023). See docs/extending.md."""

from __future__ import annotations

import numpy as np
import torch

from texforce_ray.rl.learner import Learner


class RewardWeighted(Learner):
    """The denoising loss on the policy's own samples, weighted by exp(advantage / temperature)."""

    sums = ("count", "loss")

    @staticmethod
    def kept_latents(config, process, iteration, first, count):
        keep = np.zeros((count, len(process) + 1), dtype=bool)
        keep[:, -1] = True  # only the finished sample is read
        return keep

    def shard_gradient(self, batch, kept, valid):
        process, device, rows = self.process, self.backbone.device, kept - batch.first
        # From the sample's own seed: the same noise in any shard.
        drawn = [
            np.random.default_rng([seed, self.updates]) for seed in batch.trajectory.seeds[rows]
        ]
        step = torch.tensor([rng.integers(len(process)) for rng in drawn], device=device)
        shape = self.backbone.latent_shape
        noise = torch.tensor(np.stack([rng.standard_normal(shape, np.float32) for rng in drawn]))
        weight = np.exp(batch.advantages[kept] / self.config.objective.kwargs["temperature"])
        with torch.enable_grad():
            ids = tuple(torch.from_numpy(part[rows]) for part in batch.trajectory.prompt_ids)
            conditioning, prompt = self.denoiser.encode(ids)
            latents = batch.trajectory.latents_at(rows, np.full(len(rows), len(process)))
            clean = torch.from_numpy(latents).to(device).float()
            x = process.forward(step, clean, noise.to(device))
            output = self.denoiser.output(step, x, self.denoiser.prepare(conditioning), prompt)
            error = (process.x0(step, x, output) - clean).square().mean(dim=(1, 2, 3))
            loss = (torch.from_numpy(weight).to(error) * error).sum()
            gradient = torch.autograd.grad(loss / valid, self.parameters)
        return list(gradient), {"count": len(rows), "loss": float(loss.detach())}

    def metrics(self, sums):
        return {"rwr/loss": sums["loss"] / max(1, sums["count"])}
