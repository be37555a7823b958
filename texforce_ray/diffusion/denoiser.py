"""The policy at one denoising step: a backbone, a process and guidance as one function."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from texforce_ray.diffusion.process import Process
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.conditioning import Conditioning, Prepared
from texforce_ray.model.padding import pad_batch
from texforce_ray.model.transfer import to_device


@dataclass(frozen=True)
class Denoiser:
    """Shared by sampler and learners, so that their results can differ only by rounding.

    guidance_scale: as in the stock pipeline; for most, at most 1 means no guidance, and one pass
    instead of two.
    least: rows that a compiled network is given at least, so that a rest of a few needs no code of
    its own, which takes minutes to compile.
    """

    backbone: Backbone
    process: Process
    guidance_scale: float
    least: int = 0

    @property
    def passes(self) -> int:
        """Passes through the network at each step."""
        return self.backbone.passes(self.guidance_scale)

    def unguided(self) -> Denoiser:
        """The network alone, as it is trained on the forward process."""
        return replace(self, guidance_scale=self.backbone.unguided(self.guidance_scale))

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def encode(self, ids: tuple[Tensor, ...]) -> tuple[Conditioning, np.ndarray]:
        """Conditioning of the distinct prompts among B, and each one's index into them: int64 [B].

        ids: [B, L] for each text encoder. With guidance, the empty prompt comes first.
        """
        distinct, inverse = torch.unique(torch.cat(ids, 1), dim=0, return_inverse=True)
        lengths = [part.shape[1] for part in ids]
        conditioning = self.backbone.encode(distinct.split(lengths, 1))
        rows = inverse.cpu().numpy()
        if self.passes == 2:
            conditioning, rows = (
                Conditioning.cat([self.backbone.encode_empty(), conditioning]),
                rows + 1,
            )
        return self.backbone.with_guidance(conditioning, self.guidance_scale), rows

    def prepare(self, conditioning: Conditioning) -> Prepared:
        """Conditioning in the form that the network's layers use."""
        return self.backbone.prepare(conditioning)

    def output(self, step: Tensor, x: Tensor, prepared: Prepared, rows: np.ndarray) -> Tensor:
        """The guided output of the network at each (sample, step): float32 [B, C, h, w].

        Args:
            step: int64 [B], indices of the process's steps.
            x: the latents, float [B, C, h, w].
            prepared: distinct prompts; with guidance, the empty one comes first.
            rows: int64 [B], each sample's index into them.
        """
        if self.backbone.compiled:
            count = len(rows)
            return self._output(*pad_batch(step, x, rows, self.least), prepared)[:count]
        return self._output(step, x, rows, prepared)

    def _output(self, step: Tensor, x: Tensor, rows: np.ndarray, prepared: Prepared) -> Tensor:
        timesteps = self.process.timesteps[step]
        if self.passes == 1:
            return self.backbone.predict_prepared(x, timesteps, prepared, rows).float()
        both = np.concatenate([np.zeros_like(rows), rows])
        output = self.backbone.predict_prepared(
            torch.cat([x, x]), torch.cat([timesteps, timesteps]), prepared, both
        )
        unconditional, conditional = output.float().chunk(2)
        return self.backbone.guide(unconditional, conditional, self.guidance_scale)

    def mean(self, step: Tensor, x: Tensor, prepared: Prepared, rows: np.ndarray) -> Tensor:
        """Mean of the policy's Gaussian at each (sample, step): float32 [B, C, h, w]."""
        return self.process.mean(step, x, self.output(step, x, prepared, rows))


def draw_noise(
    backbone: Backbone, seeds: np.ndarray, process: Process
) -> tuple[Tensor, dict[int, Tensor]]:
    """All noise of B samples: that of the start, and that of each step which draws some.

    float32 [B, C, h, w] each, drawn in stock diffusers' order and dtype: from one CPU generator
    for each sample, first the start, then the steps in order. A pure function of the seeds, so
    trajectories need not store it.
    """
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
    shape, cpu = (len(seeds), *backbone.latent_shape), torch.device("cpu")
    first, later = backbone.noise_dtype, process.step_noise_dtype or backbone.noise_dtype
    drawn = [
        randn_tensor(shape, generator=generators, device=cpu, dtype=dtype)
        for dtype in (first, *[later] * len(process.draws))
    ]
    if first != later:
        drawn = [noise.float() for noise in drawn]
    # A single copy to the device: a copy per step would wait for the step before.
    start, *steps = to_device(torch.stack(drawn), backbone.device).float()
    return start, dict(zip(process.draws, steps, strict=True))
