"""What a rollout actor draws for evaluations: as asked there, whatever training does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from texforce_ray.actors.messages import unpack_images
from texforce_ray.actors.rollout import RolloutActor
from texforce_ray.config.io import make_config

pytestmark = pytest.mark.usefixtures("no_cluster")

PROMPTS = ["a green circle", "two red squares"]
SEEDS = np.array([5, 2**40])


@pytest.mark.parametrize(("section", "eta"), [({"eta": 0.0}, 0.0), ({}, 0.7)])
def test_evaluation_images_are_the_stock_pipelines_at_the_evaluations_eta(
    section: dict[str, float],
    eta: float,
    tiny_pipeline: Path,
    stock_pipeline: Callable,
    stock_images: Callable,
) -> None:
    config = make_config(
        {
            "model": {"path": str(tiny_pipeline)},
            "diffusion": {"steps": 3, "guidance_scale": 1.0, "eta": 0.7},
            "eval": section,
        }
    )
    _, images = RolloutActor(config).generate(PROMPTS, SEEDS, [], guidance_scale=3.0)
    stock = stock_images(stock_pipeline(), PROMPTS, SEEDS, steps=3, eta=eta, guidance_scale=3.0)
    assert np.abs(unpack_images(images).astype(int) - stock.astype(int)).max() <= 1
