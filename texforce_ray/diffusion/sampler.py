"""Draws trajectories from the current policy. No Ray."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from texforce_ray.config import Config
from texforce_ray.diffusion.denoiser import Denoiser, draw_noise
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.diffusion.window import process_at
from texforce_ray.model.backbone import DTYPES, Backbone
from texforce_ray.model.transfer import arrived, to_device, to_host


class Sampler:
    """Draws noise in stock diffusers' order, so a logged seed gives the same image there."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        steps: int,
        eta: float,
        guidance_scale: float,
        kernel: str = "cps",
        storage_dtype: str = "float32",
        decode_batch_size: int = 0,
    ) -> None:
        """Make a sampler.

        Args:
            backbone: the pipeline.
            steps: of denoising.
            eta: how much noise they add.
            guidance_scale: at most 1 means no guidance.
            kernel: how a flow's steps add noise.
            storage_dtype: of latents.
            decode_batch_size: latents that the VAE decodes at once; 0: all of them.
        """
        self.backbone, self.steps, self.kernel = backbone, steps, kernel
        process = backbone.process(steps, eta, kernel)
        self.denoiser = Denoiser(backbone, process, guidance_scale)
        self.storage = DTYPES[storage_dtype]
        self.decode_batch_size = decode_batch_size

    @staticmethod
    def of(backbone: Backbone, config: Config) -> Sampler:
        """As a run samples what it trains on."""
        d = config.diffusion
        return Sampler(
            backbone,
            steps=d.steps,
            eta=d.eta,
            guidance_scale=d.guidance_scale,
            kernel=d.kernel,
            storage_dtype=d.storage_dtype,
            decode_batch_size=config.rollout.decode_batch_size,
        )

    def drawing(self, guidance_scale: float, eta: float, steps: int | None = None) -> Sampler:
        """The same with other settings, only for images: eta = 0 has no likelihood.

        All its steps add noise, if `eta` is not 0.
        """
        other = copy.copy(self)
        other.steps = steps or self.steps
        process = self.backbone.process(other.steps, eta, self.kernel)
        other.denoiser = Denoiser(self.backbone, process, guidance_scale)
        return other

    def at(self, config: Config, iteration: int) -> Sampler:
        """The same with the noise of an iteration: in its window alone, if there is one."""
        other = copy.copy(self)
        process = process_at(config, self.denoiser.process, iteration)
        other.denoiser = replace(self.denoiser, process=process)
        return other

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: np.ndarray,
        policy_version: int,
        keep: np.ndarray | None = None,
    ) -> tuple[Trajectory, np.ndarray]:
        """One trajectory per prompt, and its image.

        Args:
            prompts: B texts.
            seeds: int64 [B].
            policy_version: recorded in the trajectory.
            keep: bool [B, T + 1], the latents that are stored; all by default.

        Returns:
            The trajectory, and images as uint8 [B, H, W, 3].
        """
        backbone, denoiser = self.backbone, self.denoiser
        process = denoiser.process
        ids = backbone.tokenize(prompts).ids
        conditioning, rows = denoiser.encode(ids)
        prepared = denoiser.prepare(conditioning)
        first, noise = draw_noise(backbone, seeds, process)
        noisy = bool(noise)  # a deterministic solver draws its start alone
        # Denoising itself is computed in float32, whatever the networks' dtype: a mean rounded to
        # half precision would make likelihoods meaningless.
        x = process.start(first).to(self.storage).float()
        latents, log_probs = [x], [x.new_empty(len(prompts), 0)]
        for index in range(len(process)):
            step = torch.full((len(prompts),), index, device=x.device)
            mean = denoiser.mean(step, x, prepared, rows)
            # Continue from the stored value, so that the learner sees what was sampled.
            drawn = noise[index] if index in noise else torch.zeros_like(mean)
            x = process.advance(step, mean, drawn).to(self.storage).float()
            latents.append(x)
            if noisy:
                log_probs.append(process.log_prob(step, x, mean)[:, None])
        chosen, slots = _layout(keep, len(prompts), len(latents))
        rows_of = torch.arange(len(prompts), device=x.device)[:, None]
        kept = torch.stack(latents, 1)[rows_of, to_device(chosen, x.device)]
        stored, likelihoods = to_host(kept.to(self.storage)), to_host(torch.cat(log_probs, 1))
        images = [to_host(backbone.decode(p)) for p in x.split(self.decode_batch_size or len(x))]
        arrived(x.device)
        trajectory = Trajectory(
            prompt_ids=tuple(part.numpy() for part in ids),
            latents=stored.numpy(),
            slots=slots,
            timesteps=process.timesteps.cpu().numpy(),
            log_probs=likelihoods.numpy(),
            prompts=tuple(prompts),
            seeds=np.asarray(seeds, dtype=np.int64),
            policy_version=policy_version,
        )
        return trajectory, torch.cat(images).numpy()


def _layout(keep: np.ndarray | None, count: int, latents: int) -> tuple[np.ndarray, np.ndarray]:
    """The latent in each slot, int64 [B, M], and each latent's slot: see `Trajectory`."""
    if keep is None:
        everything = np.tile(np.arange(latents), (count, 1))
        return everything, everything
    most = int(keep.sum(axis=1).max())
    # Kept latents first, in order; samples with fewer of them are filled up with others.
    index = np.argsort(~keep, axis=1, kind="stable")[:, :most]
    slots = np.where(keep, np.cumsum(keep, axis=1) - 1, -1)
    return index, slots
