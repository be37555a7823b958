"""Your own model family and denoising process: see docs/extending.md."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from texforce_ray.artifacts.families import Family
from texforce_ray.diffusion.process import Process, per_sample
from texforce_ray.model.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class FlowCps(Process):
    """Rectified flow with coefficients-preserving noise (Flow-CPS, 2025).

    level, following: noise levels before and after each step, [T]; noise: share of fresh noise.
    """

    timesteps: Tensor
    level: Tensor
    following: Tensor
    noise: float

    @property
    def sigma(self) -> Tensor:
        return self.following * torch.sin(torch.tensor(self.noise * torch.pi / 2))

    def to(self, device):
        moved = {n: getattr(self, n).to(device) for n in ("timesteps", "level", "following")}
        return replace(self, **moved)

    def x0(self, step, x, output):
        return x - per_sample(self.level, step, x) * output

    def mean(self, step, x, output):
        level, following = (per_sample(v, step, x) for v in (self.level, self.following))
        x1 = x + (1 - level) * output
        kept = torch.cos(torch.tensor(self.noise * torch.pi / 2))
        return (1 - following) * self.x0(step, x, output) + following * kept * x1

    def forward(self, step, x0, noise):
        level = per_sample(self.level, step, x0)
        return (1 - level) * x0 + level * noise


class FlowUnet(StableDiffusion):
    """A U-Net that predicts velocities: only the process differs from Stable Diffusion's."""

    def _scheduler(self):
        return self.pipe.scheduler

    def process(self, steps, eta, kernel):
        levels = torch.linspace(1, 0, steps + 1)
        return FlowCps(levels[:-1] * 1000, levels[:-1], levels[1:], eta).to(self.device)


# For pipelines of this class, model.family=own_backbone:FLOW stands in for the built-in row.
FLOW = Family(
    "StableDiffusionPipeline",
    f"{__name__}:FlowUnet",
    {"text_encoder": "CLIPTextModel"},
    schedulers=("FlowMatchEulerDiscreteScheduler",),
    load={"safety_checker": None, "requires_safety_checker": False},
)
