"""A scheduler for stock pipelines that draws again what a run has sampled with noise.

    pipe.scheduler = SeededFlowScheduler.of(pipe.scheduler, kernel="cps", eta=0.8, window=(2, 3))
    images = pipe(prompts, generator=pipe.scheduler.generators(seeds), ...).images

Stock pipelines give their scheduler no generator, so this one holds them: one for each sample, as
`denoiser.draw_noise` uses them. Samples without noise (eta 0) need nothing of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from texforce_ray.diffusion.flow import KERNELS, Flow
from texforce_ray.diffusion.packing import pack


class SeededFlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Steps with noise from one CPU generator for each sample; computed in float32."""

    kernel: str = "cps"
    eta: float = 0.8
    window: tuple[int, ...] | None = None
    latent_size: tuple[int, int] | None = None
    _generators: Sequence[torch.Generator] = ()
    _flow: Flow

    @classmethod
    def of(
        cls,
        scheduler: Any,
        *,
        kernel: str = "cps",
        eta: float = 0.8,
        window: Sequence[int] | None = None,
        latent_size: tuple[int, int] | None = None,
    ) -> SeededFlowScheduler:
        """The same noise levels as a pipeline's scheduler, with noise.

        Args:
            scheduler: a `FlowMatchEulerDiscreteScheduler`.
            kernel: `diffusion.kernel`.
            eta: `diffusion.eta`.
            window: the steps with noise, as a run records them; None: all of them.
            latent_size: height and width in latents, needed for pipelines that pack them (FLUX).

        Raises:
            ValueError: an unknown kernel.
        """
        if kernel not in KERNELS:
            raise ValueError(f"kernel {kernel!r} is not in {KERNELS}")
        own = cls.from_config(scheduler.config)
        own.kernel, own.eta, own.latent_size = kernel, eta, latent_size
        own.window = None if window is None else tuple(window)
        return own

    def generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        """Generators for the pipeline's call, which the steps then continue to use."""
        self._generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
        return list(self._generators)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the base class; pipelines look for these names."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        flow = Flow.of(self.timesteps.cpu(), self.sigmas.cpu(), self.kernel, self.eta)
        self._flow = flow if self.window is None else flow.windowed(self.window)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *_: Any,
        return_dict: bool = True,
        **__: Any,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The next latent, in the dtype of `model_output`.

        Raises:
            ValueError: `generators` was not called, or for another number of samples.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        step = torch.full((len(sample),), index)
        x = sample.float()
        x = self._flow.to(x.device).mean(step.to(x.device), x, model_output.float())
        if index in self._flow.draws:
            x = self._flow.to(x.device).advance(step.to(x.device), x, self._noise(x))
        self._step_index = index + 1
        x = x.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _noise(self, x: Tensor) -> Tensor:
        if len(self._generators) != len(x):
            raise ValueError(
                f"{len(x)} samples, but generators(seeds) was called for {len(self._generators)}: "
                "pass generator=pipe.scheduler.generators(seeds) to the pipeline"
            )
        cpu, generators = torch.device("cpu"), list(self._generators)
        if x.ndim > 3:
            return randn_tensor(x.shape, generators, cpu, torch.float32).to(x.device)
        count, tokens, channels = x.shape  # packed: 2 x 2 latents in each token
        if self.latent_size is None:
            raise ValueError(
                "latent_size: needed for a pipeline that packs its latents (FLUX): the image's "
                "height and width, each divided by 8"
            )
        height, width = self.latent_size
        if height * width != 4 * tokens:
            raise ValueError(f"latent_size: {height} x {width} is not {tokens} x 4 latents")
        shape = (count, channels // 4, height, width)
        return pack(randn_tensor(shape, generators, cpu, torch.float32)).to(x.device)
