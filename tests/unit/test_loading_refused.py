"""Pipelines that would be drawn otherwise, or with random weights, are refused by file and key."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.unit.drawing import assert_equal, draw
from texforce_ray.artifacts.location import locate_model
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import load_backbone

# ---- weights that are not there -----------------------------------------------------------


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_part_that_would_get_random_weights_is_refused(
    pipelines: dict[str, Path], tmp_path: Path, part: str
) -> None:
    path = tmp_path / "foreign"
    shutil.copytree(pipelines["sd15"], path)
    file = next((path / part).glob("*.safetensors"))
    foreign = {f"encoder.model.{k}": v for k, v in load_file(file).items()}
    save_file(foreign, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"model\.path: .*: {part} would get random weights"):
        load_backbone(str(path))


def test_one_missing_tensor_is_named(pipelines: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "incomplete"
    shutil.copytree(pipelines["sdxl"], path)
    file = path / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("text_projection.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"text_encoder_2 .*text_projection\.weight"):
        load_backbone(str(path))


def test_a_pipeline_with_half_precision_files_alone_says_which_variant(
    pipelines: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "fp16"
    DiffusionPipeline.from_pretrained(pipelines["sd15"]).save_pretrained(path, variant="fp16")
    with pytest.raises(ConfigError, match=r"only weights of variant fp16; set model\.variant=fp16"):
        locate_model(str(path))
    assert locate_model(str(path), "fp16") == str(path)
    assert_equal(draw(path, variant="fp16"), draw(pipelines["sd15"]))
    with pytest.raises(ConfigError, match=r"set model\.variant=fp16 instead of 'ema'"):
        locate_model(str(path), "ema")
    with pytest.raises(ConfigError, match=r"model\.variant: .*no weights of variant 'ema'"):
        locate_model(str(pipelines["sd15"]), "ema")


# ---- what would be drawn otherwise --------------------------------------------------------


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "lcm": ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
    "classes": ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
    "image": ("unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type"),
    "other embedding": ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed"),
    "attention": ("unet/config.json", {"only_cross_attention": [False, True]}, "only_cross_att"),
    "gated": ("unet/config.json", {"attention_type": "gated"}, "attention_type 'gated'"),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "in_channels 9 where the VAE has 4"),
    "video": ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "UNet3DCondition"),
    "edm": ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEuler"),
    "flow": (
        "scheduler/scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        "is a FlowMatchEulerDiscreteScheduler, whose noise schedule is not a DDPM's",
    ),
    "flow sigmas": ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow"),
    "continuous": (
        "scheduler/scheduler_config.json",
        {"timestep_type": "continuous"},
        "timestep_t",
    ),
    "prediction": ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "fl"),
    "vae shift": ("vae/config.json", {"shift_factor": 0.1}, "vae/config.json has shift_factor 0.1"),
    "vae mean": ("vae/config.json", {"latents_mean": [0.0] * 4}, "has latents_mean"),
    "vae kind": ("vae/config.json", {"_class_name": "VQModel"}, "the VAE is a VQModel"),
    "mask": ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask True"),
    "no encoder": ("model_index.json", {"text_encoder": [None, None]}, "has no text_encoder"),
    "null encoder": ("model_index.json", {"text_encoder": None}, "has no text_encoder"),
    "other encoder": (
        "model_index.json",
        {"text_encoder": ["transformers", "RobertaModel"]},
        "text_encoder is a RobertaModel; supported: CLIPTextModel",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_changes_the_image_and_is_not_understood_is_refused_by_name(
    changed_pipeline: Callable[..., Path], case: str
) -> None:
    """Before anything is loaded: `locate_model` needs no torch."""
    file, changes, words = REFUSED[case]
    path = changed_pipeline(file, changes)
    with pytest.raises(ConfigError, match=r"model\.path: .*") as caught:
        locate_model(str(path))
    assert words in str(caught.value)


def test_an_sdxl_refiner_is_refused(changed_pipeline: Callable[..., Path]) -> None:
    path = changed_pipeline("model_index.json", {"text_encoder": [None, None]}, name="sdxl")
    with pytest.raises(ConfigError, match="has no text_encoder"):
        locate_model(str(path))


def test_a_replacing_unet_is_looked_at_too(
    changed_pipeline: Callable[..., Path], pipelines: dict[str, Path]
) -> None:
    path = changed_pipeline("unet/config.json", {"class_embed_type": "timestep"})
    with pytest.raises(ConfigError, match=r"model\.denoiser: .*class_embed_type"):
        load_backbone(str(pipelines["sd15"]), denoiser=str(path))


def test_a_hub_id_that_cannot_be_had_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="and cannot be downloaded from the Hugging"):
        load_backbone("nobody/nothing")
