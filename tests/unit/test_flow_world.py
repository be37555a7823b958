"""The embedded flow pipeline: what it shares, what it weighs, what it draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.numpy import load_file

from texforce_ray.artifacts.location import EMBEDDED, EMBEDDED_FLOW
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.experiments.measuring import questions
from texforce_ray.model.backbone import load_backbone
from texforce_ray.model.conditioning import Drawing
from texforce_ray.shapes import detector
from texforce_ray.shapes.flow_networks import T5_LENGTH

DRAWING = Drawing(max_sequence_length=T5_LENGTH)


def test_it_shares_an_encoder_with_the_ddim_pipeline_and_is_small() -> None:
    """So that an adapter of that encoder can be tried in both."""
    file = "text_encoder/model.safetensors"
    shared, own = load_file(EMBEDDED / file), load_file(EMBEDDED_FLOW / file)
    assert own.keys() - shared.keys() == {"text_projection.weight"}
    assert all(np.array_equal(shared[key], own[key]) for key in shared)
    assert sum(f.stat().st_size for f in EMBEDDED_FLOW.rglob("*") if f.is_file()) < 12e6


def test_the_stock_pipeline_draws_what_we_draw() -> None:
    backbone = load_backbone("embedded-flow", drawing=DRAWING)
    prompts, seeds = ["a green circle", "three red squares"], np.array([1, 2])
    _, ours = Sampler(backbone, steps=4, eta=0.0, guidance_scale=3.0).sample(prompts, seeds, 0)
    pipe = StableDiffusion3Pipeline.from_pretrained(EMBEDDED_FLOW)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        prompts, num_inference_steps=4, guidance_scale=3.0, max_sequence_length=T5_LENGTH,
        generator=[torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds],
        output_type="np",
    ).images  # fmt: skip
    assert np.abs(np.round(stock * 255) - ours).max() <= 1


@pytest.mark.long
def test_it_draws_careful_prompts_right_and_plain_ones_half_right() -> None:
    """What reinforcement learning can gain: the model knows better than plain prompts ask."""
    backbone = load_backbone("embedded-flow", drawing=DRAWING)
    sampler = Sampler(backbone, steps=10, eta=0.0, guidance_scale=3.0)
    scores: dict[str, list[float]] = {"plain": [], "careful": []}
    for ability in ("color", "location"):
        scenes, careful, seeds = questions(ability, 24)
        for register, prompts in (("plain", [s.caption for s in scenes]), ("careful", careful)):
            _, images = sampler.sample(prompts, seeds, 0)
            scores[register] += [
                detector.score(image, scene) for image, scene in zip(images, scenes, strict=True)
            ]
    assert np.mean(scores["careful"]) > 0.85
    assert 0.2 < np.mean(scores["plain"]) < 0.6
