"""Draws trajectories from the current policy. No Ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from texforce_ray.diffusion import ddim
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.model.backbone import Backbone, Conditioning

_STORAGE = {"float32": torch.float32, "float16": torch.float16}


class Sampler:
    """Samples with noise in stock diffusers' order, so a logged seed can be drawn again there."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        steps: int,
        eta: float,
        guidance_scale: float,
        storage_dtype: str = "float32",
    ) -> None:
        self.backbone = backbone
        self.table = ddim.step_table(backbone.scheduler, steps, eta).to(backbone.device)
        self.guidance_scale = guidance_scale
        self.storage = _STORAGE[storage_dtype]

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: np.ndarray, policy_version: int
    ) -> tuple[Trajectory, np.ndarray]:
        """One trajectory per prompt, and its image.

        Args:
            prompts: B texts.
            seeds: int64 [B].
            policy_version: recorded in the trajectory.

        Returns:
            The trajectory, and images as uint8 [B, H, W, 3].
        """
        backbone, table = self.backbone, self.table
        ids = backbone.tokenize(prompts).ids
        conditioning = encode_for_guidance(backbone, ids, self.guidance_scale)
        generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
        shape = (len(prompts), *backbone.latent_shape)
        x = self._noise(shape, generators) * backbone.init_noise_sigma
        x = x.to(self.storage).to(backbone.dtype)
        latents, log_probs = [x], []
        for index in range(len(table.timesteps)):
            step = torch.full((len(prompts),), index, device=x.device)
            mean = policy_mean(backbone, table, step, x, conditioning, self.guidance_scale)
            noise = self._noise(shape, generators)
            # The sampler goes on from the stored value: the learner sees what was sampled.
            x = ddim.add_noise(table, step, mean, noise).to(self.storage).to(backbone.dtype)
            latents.append(x)
            log_probs.append(ddim.log_prob(table, step, x.float(), mean.float()))
        trajectory = Trajectory(
            prompt_ids=tuple(part.numpy() for part in ids),
            latents=torch.stack(latents, 1).to(self.storage).cpu().numpy(),
            timesteps=table.timesteps.cpu().numpy(),
            log_probs=torch.stack(log_probs, 1).cpu().numpy(),
            prompts=tuple(prompts),
            seeds=np.asarray(seeds, dtype=np.int64),
            policy_version=policy_version,
        )
        return trajectory, backbone.decode(x)

    def _noise(self, shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
        return randn_tensor(
            shape, generator=generators, device=self.backbone.device, dtype=self.backbone.dtype
        )


def encode_for_guidance(
    backbone: Backbone, ids: tuple[Tensor, ...], guidance_scale: float
) -> Conditioning:
    """Conditioning for B prompts, behind that of B empty prompts if there is guidance.

    Each distinct prompt is encoded once.
    """
    distinct, inverse = torch.unique(torch.cat(ids, 1), dim=0, return_inverse=True)
    lengths = [part.shape[1] for part in ids]
    conditioning = backbone.encode(distinct.split(lengths, 1))[inverse]
    if guidance_scale <= 1:
        return conditioning
    empty = backbone.encode_empty()
    return Conditioning.cat([empty[torch.zeros_like(inverse)], conditioning])


def policy_output(
    backbone: Backbone,
    table: ddim.StepTable,
    step: Tensor,
    x: Tensor,
    conditioning: Conditioning,
    guidance_scale: float,
) -> Tensor:
    """The guided output of the U-Net at each (sample, step): float [B, C, h, w].

    `conditioning` holds B prompts, or 2 B with the empty ones first where guidance_scale > 1.
    """
    timesteps = table.timesteps[step]
    if guidance_scale <= 1:
        return backbone.predict(x, timesteps, conditioning)
    output = backbone.predict(torch.cat([x, x]), torch.cat([timesteps, timesteps]), conditioning)
    unconditional, conditional = output.chunk(2)
    return ddim.guide(unconditional, conditional, guidance_scale)


def policy_mean(
    backbone: Backbone,
    table: ddim.StepTable,
    step: Tensor,
    x: Tensor,
    conditioning: Conditioning,
    guidance_scale: float,
) -> Tensor:
    """Mean of the policy's Gaussian at each (sample, step): float [B, C, h, w].

    Sampler and learner share this function: what they compute can only differ by rounding.
    """
    output = policy_output(backbone, table, step, x, conditioning, guidance_scale)
    return ddim.step_mean(table, step, x, output)


def replay_noise(backbone: Backbone, seeds: np.ndarray, steps: int) -> list[Tensor]:
    """The noise that `Sampler` added at each of `steps` denoising steps: float [B, C, h, w] each.

    A pure function of the seeds, so trajectories need not carry it.
    """
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
    shape = (len(seeds), *backbone.latent_shape)
    drawn = [
        randn_tensor(shape, generator=generators, device=backbone.device, dtype=backbone.dtype)
        for _ in range(steps + 1)
    ]
    return drawn[1:]  # the first is where denoising starts
