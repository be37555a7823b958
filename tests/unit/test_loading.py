"""Pipelines as people have them are drawn as stock diffusers draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.unit.drawing import SEEDS, assert_equal, draw, draw_stock
from texforce_ray.config.io import make_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import load_backbone
from texforce_ray.model.conditioning import Drawing


def _with_text_model(pipe: Any) -> None:
    # diffusers 0.42 looks for the layers where transformers before 5.6 had them.
    if not hasattr(pipe.text_encoder, "text_model"):
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder


@pytest.mark.long
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "asked",
    [
        {"height": 48, "width": 80},
        {"negative_prompt": "three blue triangles"},
        {"clip_skip": 1},
        {"clip_skip": 1, "negative_prompt": "a red square", "height": 32, "width": 32},
    ],
    ids="+".join,
)
def test_images_are_those_of_stock_diffusers(
    pipelines: dict[str, Path], family: str, asked: dict[str, Any]
) -> None:
    if family == "sdxl" and "clip_skip" in asked:
        pytest.skip("the miniature's second encoder has too few layers")
    path = pipelines[family]
    stock = dict(asked)
    if "negative_prompt" in stock:
        stock["negative_prompt"] = [stock["negative_prompt"]] * 2
    prepare = _with_text_model if family == "sd15" else lambda _: None
    expected = draw_stock(path, prepare, **stock)
    assert_equal(draw(path, drawing=Drawing(**asked)), expected)
    assert (expected.shape != draw_stock(path).shape) or (expected != draw_stock(path)).any()


def test_a_negative_prompt_replaces_zeros_where_there_are_zeros_for_the_empty_one(
    pipelines: dict[str, Path],
) -> None:
    path = pipelines["sdxl"]
    expected = draw_stock(path, negative_prompt=["", ""])
    assert_equal(draw(path, drawing=Drawing(negative_prompt="")), expected)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"height": 60}, r"diffusion\.height: 60 is not a multiple of 8"),
        ({"clip_skip": 9}, r"diffusion\.clip_skip: 9 leaves no layer of a text encoder that has 3"),
    ],
)
def test_sizes_and_layers_that_the_model_lacks_are_refused(
    pipelines: dict[str, Path], asked: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        load_backbone(str(pipelines["sd15"]), drawing=Drawing(**asked))


def test_half_a_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="height, width: give both"):
        make_config({"diffusion": {"width": 64}})


def test_a_negative_prompt_without_guidance_is_refused() -> None:
    with pytest.raises(ConfigError, match="negative_prompt: has no effect with guidance_scale 1"):
        make_config({"diffusion": {"guidance_scale": 1.0, "negative_prompt": "blurry"}})


def test_a_textual_inversion_of_several_vectors_is_used_whole(
    pipelines: dict[str, Path], tmp_path: Path
) -> None:
    pipe = DiffusionPipeline.from_pretrained(pipelines["sd15"])
    tokens = ["<style>", "<style>_1", "<style>_2"]
    pipe.tokenizer.add_tokens(tokens)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[-3:].normal_(
            generator=torch.Generator().manual_seed(1)
        )
    pipe.save_pretrained(tmp_path / "inverted")
    prompts = ["a <style> circle", "two red <style>"]
    backbone = load_backbone(str(tmp_path / "inverted"))
    ids = backbone.tokenize(prompts).ids[0]
    new = set(pipe.tokenizer.convert_tokens_to_ids(tokens))
    assert all(new <= set(row.tolist()) for row in ids)
    images = Sampler(backbone, steps=3, eta=1.0, guidance_scale=3.0).sample(prompts, SEEDS, 0)[1]
    assert_equal(images, draw_stock(tmp_path / "inverted", prompt=prompts))


def test_a_tokenizer_without_a_limit_takes_the_encoders(
    changed_pipeline: Callable[..., Path],
) -> None:
    path = changed_pipeline("tokenizer/tokenizer_config.json", {})
    values = json.loads((path / "tokenizer/tokenizer_config.json").read_text())
    values.pop("model_max_length")
    (path / "tokenizer/tokenizer_config.json").write_text(json.dumps(values))
    tokens = load_backbone(str(path)).tokenize(["a circle " * 50, "a circle"])
    assert tokens.truncated == [True, False]
    assert tokens.ids[0].shape[1] == load_backbone("embedded").tokenize(["x"]).ids[0].shape[1]


def test_sdxls_latents_are_shifted_as_stock_does(changed_pipeline: Callable[..., Path]) -> None:
    path = changed_pipeline(
        "vae/config.json",
        {"latents_mean": [0.5, -1.0, 0.2, 1.0], "latents_std": [2.0, 1.5, 0.7, 1.0]},
        name="sdxl",
    )
    assert_equal(draw(path), draw_stock(path))
