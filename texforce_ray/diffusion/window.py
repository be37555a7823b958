"""Which steps add noise in an iteration: `diffusion.window` (Flow-GRPO-Fast, MixGRPO)."""

from __future__ import annotations

from typing import TypeVar

from texforce_ray import randomness
from texforce_ray.config import Config
from texforce_ray.diffusion.process import Process

_Process = TypeVar("_Process", bound=Process)


def process_at(config: Config, process: _Process, iteration: int) -> _Process:
    """The process of an iteration's samples: with a window, deterministic outside of it."""
    steps = window_steps(config, iteration)
    return process if steps is None else process.windowed(steps)


def window_steps(config: Config, iteration: int) -> list[int] | None:
    """The steps of the iteration's window; None if all steps add noise.

    One for all samples of an iteration: with one for each request, advantages would compare
    samples of different noise.
    """
    d = config.diffusion
    if d.window is None:
        return None
    return randomness.window(config.seed, iteration, d.window.size, d.window_range)
