"""The same images drawn by us and by stock diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.model.backbone import load_backbone

PROMPTS = ["a green circle", "two red squares"]
SEEDS = np.array([7, 2**40])


def draw(path: Path | str, guidance_scale: float = 3.0, **options: Any) -> np.ndarray:
    sampler = Sampler(
        load_backbone(str(path), **options), steps=3, eta=1.0, guidance_scale=guidance_scale
    )
    return sampler.sample(PROMPTS, SEEDS, 0)[1]


def draw_stock(path: Path, prepare: Callable[[Any], None] = lambda _: None, **options: Any) -> Any:
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    prepare(pipe)
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in SEEDS]
    how: dict[str, Any] = {"guidance_scale": 3.0} | options
    images = pipe(
        how.pop("prompt", PROMPTS), num_inference_steps=3, eta=1.0, generator=generators, **how
    ).images
    return np.stack([np.asarray(image) for image in images])


def assert_equal(ours: np.ndarray, stock: np.ndarray) -> None:
    assert ours.shape == stock.shape
    assert int(np.abs(ours.astype(int) - stock.astype(int)).max()) <= 1
