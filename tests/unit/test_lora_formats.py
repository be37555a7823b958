"""Every LoRA form through every door, against what stock diffusers and PEFT make of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors.torch import save_file

from tests.unit import lora_files
from tests.unit.lora_doors import (
    DOORS,
    HOW,
    PROMPTS,
    SEEDS,
    TEXT,
    UNET,
    difference,
    draw,
    through_denoiser_adapters,
)
from texforce_ray.artifacts.snapshot import LoraShape, PolicySnapshot
from texforce_ray.model.backbone import load_backbone
from texforce_ray.model.fusion import compress, fuse, update_of

CONVOLUTIONS = LoraShape(2, 3.0, ("conv1", "proj_in", "conv_shortcut", "conv_in"))


def _stock(pipe: StableDiffusionPipeline, path: Path, form: str) -> None:
    if form.startswith("PEFT"):
        for part in ("text_encoder", "unet"):
            folder = path / part if (path / part).is_dir() else path
            if form == "PEFT folder, .bin" and part == "text_encoder":
                # Today's PEFT leaves text_model. keys out, with a warning; transformers does not,
                # but reads safetensors alone.
                file = folder / "adapter_model.bin"
                save_file(torch.load(file, weights_only=True), file.with_suffix(".safetensors"))
                pipe.text_encoder.load_adapter(str(folder))
                file.with_suffix(".safetensors").unlink()
                continue
            setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), folder))
    elif form == "attn_procs":  # what stock diffusers reads in the U-Net's own door alone
        state = torch.load(path, weights_only=True)
        pipe.load_lora_weights({f"unet.{key}": value for key, value in state.items()})
    else:
        pipe.load_lora_weights(path, unet_config=pipe.unet.config)


@pytest.mark.long
@pytest.mark.parametrize("form", lora_files.WRITERS)
def test_every_form_through_every_door(
    form: str,
    make_policy: Callable[..., PolicySnapshot],
    tiny_pipeline: Path,
    stock_pipeline: Callable[[], StableDiffusionPipeline],
    stock_images: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    shapes = {"unet": UNET} if form == "attn_procs" else {"text_encoder": TEXT, "unet": UNET}
    snapshot = make_policy(shapes)
    path = lora_files.WRITERS[form](snapshot, tmp_path / "given")
    pipe = stock_pipeline()
    base = stock_images(pipe, PROMPTS, SEEDS, **HOW)
    _stock(pipe, path, form)
    expected = stock_images(pipe, PROMPTS, SEEDS, **HOW)
    assert difference(expected, base) > 10
    assert difference(draw(load_backbone(str(tiny_pipeline)), snapshot), expected) <= 1
    for door in ("fuse", "evaluate --adapter", "lora.init"):
        images = DOORS[door](path, tiny_pipeline, tmp_path / "fused")
        assert difference(images, expected) <= 1, door
    # There the U-Net's part alone is taken.
    alone = PolicySnapshot(0, {"unet": UNET}, {"unet": snapshot.adapters["unet"]})
    images = through_denoiser_adapters(path, tiny_pipeline, tmp_path)
    assert difference(images, draw(load_backbone(str(tiny_pipeline)), alone)) <= 1


@pytest.mark.long
@pytest.mark.parametrize("form", ["PEFT folder", "diffusers, new", "kohya", "kohya, LDM blocks"])
def test_convolutions_through_every_door(
    form: str,
    make_policy: Callable[..., PolicySnapshot],
    tiny_pipeline: Path,
    stock_pipeline: Callable[[], StableDiffusionPipeline],
    stock_images: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    shape = CONVOLUTIONS
    if "LDM" in form:  # LDM's name of conv_in is no block's
        shape = LoraShape(2, 3.0, ("conv1", "proj_in", "conv_shortcut"))
    snapshot = make_policy({"unet": shape})
    path = lora_files.WRITERS[form](snapshot, tmp_path / "given")
    pipe = stock_pipeline()
    if form == "PEFT folder":
        pipe.unet = PeftModel.from_pretrained(pipe.unet, path)
    else:
        pipe.load_lora_weights(path, unet_config=pipe.unet.config)
    expected = stock_images(pipe, PROMPTS, SEEDS, **HOW)
    for name in ("fuse", "evaluate --adapter", "model.denoiser_adapters"):
        images = DOORS[name](path, tiny_pipeline, tmp_path / "fused")
        assert difference(images, expected) <= 1, name


def test_compression_keeps_convolutions(make_policy: Callable[..., PolicySnapshot]) -> None:
    snapshot = make_policy({"unet": CONVOLUTIONS})
    whole, error = compress(fuse([(1.0, snapshot)]), 2)
    assert error < 1e-6
    for name, update in update_of(snapshot, "unet").items():
        np.testing.assert_allclose(update_of(whole, "unet")[name], update, atol=1e-5)
