"""Draws trajectories from the current policy. No Ray."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from texforce_ray.diffusion import ddim
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.conditioning import Conditioning, Prepared

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
        decode_batch_size: int = 0,
    ) -> None:
        """`decode_batch_size`: latents that the VAE decodes at once; 0: all."""
        self.backbone = backbone
        self.steps = steps
        self.table = ddim.step_table(backbone.scheduler, steps, eta).to(backbone.device)
        self.guidance_scale = guidance_scale
        self.storage = _STORAGE[storage_dtype]
        self.decode_batch_size = decode_batch_size

    def drawing(self, guidance_scale: float, eta: float) -> Sampler:
        """The same with another guidance and eta, for images alone: eta = 0 has no likelihood."""
        other = copy.copy(self)
        table = ddim.step_table(self.backbone.scheduler, self.steps, eta)
        other.table = table.to(self.backbone.device)
        other.guidance_scale = guidance_scale
        return other

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
        backbone, table, scale = self.backbone, self.table, self.guidance_scale
        ids = backbone.tokenize(prompts).ids
        conditioning, rows = encode_distinct(backbone, ids, scale)
        prepared = backbone.prepare(conditioning)
        first, *noise = draw_noise(backbone, seeds, len(table.timesteps))
        # Denoising itself is computed in float32, whatever the networks' dtype: a mean that is
        # rounded to half precision would make likelihoods meaningless.
        x = (first * backbone.init_noise_sigma).to(self.storage).float()
        latents, log_probs = [x], []
        for index in range(len(table.timesteps)):
            step = torch.full((len(prompts),), index, device=x.device)
            mean = policy_mean(backbone, table, step, x, prepared, rows, scale)
            # The sampler goes on from the stored value: the learner sees what was sampled.
            x = ddim.add_noise(table, step, mean, noise[index]).to(self.storage).float()
            latents.append(x)
            log_probs.append(ddim.log_prob(table, step, x, mean))
        trajectory = Trajectory(
            prompt_ids=tuple(part.numpy() for part in ids),
            latents=torch.stack(latents, 1).to(self.storage).cpu().numpy(),
            timesteps=table.timesteps.cpu().numpy(),
            log_probs=torch.stack(log_probs, 1).cpu().numpy(),
            prompts=tuple(prompts),
            seeds=np.asarray(seeds, dtype=np.int64),
            policy_version=policy_version,
        )
        parts = x.split(self.decode_batch_size or len(x))
        return trajectory, np.concatenate([backbone.decode(part) for part in parts])


def encode_distinct(
    backbone: Backbone, ids: tuple[Tensor, ...], guidance_scale: float
) -> tuple[Conditioning, np.ndarray]:
    """Conditioning of the distinct prompts among B, and which of them each is: int64 [B].

    Where there is guidance, the empty prompt comes first.
    """
    distinct, inverse = torch.unique(torch.cat(ids, 1), dim=0, return_inverse=True)
    lengths = [part.shape[1] for part in ids]
    conditioning = backbone.encode(distinct.split(lengths, 1))
    rows = inverse.cpu().numpy()
    if guidance_scale <= 1:
        return conditioning, rows
    return Conditioning.cat([backbone.encode_empty(), conditioning]), rows + 1


def policy_output(
    backbone: Backbone,
    table: ddim.StepTable,
    step: Tensor,
    x: Tensor,
    prepared: Prepared,
    rows: np.ndarray,
    guidance_scale: float,
) -> Tensor:
    """The guided output of the U-Net at each (sample, step): float32 [B, C, h, w].

    Sample b has prompt `rows[b]` of the prepared ones; the empty one is the first of them where
    guidance_scale > 1.
    """
    timesteps = table.timesteps[step]
    if guidance_scale <= 1:
        return backbone.predict_prepared(x, timesteps, prepared, rows).float()
    both = np.concatenate([np.zeros_like(rows), rows])
    output = backbone.predict_prepared(
        torch.cat([x, x]), torch.cat([timesteps, timesteps]), prepared, both
    )
    unconditional, conditional = output.float().chunk(2)
    return ddim.guide(unconditional, conditional, guidance_scale)


def policy_mean(
    backbone: Backbone,
    table: ddim.StepTable,
    step: Tensor,
    x: Tensor,
    prepared: Prepared,
    rows: np.ndarray,
    guidance_scale: float,
) -> Tensor:
    """Mean of the policy's Gaussian at each (sample, step): float32 [B, C, h, w].

    Sampler and learner share this function: what they compute can only differ by rounding.
    """
    output = policy_output(backbone, table, step, x, prepared, rows, guidance_scale)
    return ddim.step_mean(table, step, x, output)


def draw_noise(backbone: Backbone, seeds: np.ndarray, steps: int) -> list[Tensor]:
    """All noise of B samples: where denoising starts, then that of each step: [B, C, h, w] each.

    float32, in stock diffusers' order and dtype. A pure function of the seeds, so trajectories
    need not carry it.
    """
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
    shape = (len(seeds), *backbone.latent_shape)
    drawn = [
        randn_tensor(
            shape, generator=generators, device=torch.device("cpu"), dtype=backbone.noise_dtype
        )
        for _ in range(steps + 1)
    ]
    # One copy to the device: one for each step would wait for the step before.
    return list(torch.stack(drawn).to(backbone.device).float())
