"""Which steps add noise in an iteration: `diffusion.window` (Flow-GRPO-Fast, MixGRPO)."""

from __future__ import annotations

from typing import TypeVar

from texforce_ray.config import Config
from texforce_ray.diffusion.process import Process

_Process = TypeVar("_Process", bound=Process)


def process_at(config: Config, process: _Process, iteration: int) -> _Process:
    """The process of an iteration's samples: with a window, deterministic outside of it."""
    steps = config.window_steps(iteration)
    return process if steps is None else process.windowed(steps)
