"""Every scale that a LoRA file records is applied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.unit import lora_files
from tests.unit.lora_doors import DOORS, HOW, PROMPTS, SEEDS, TEXT, UNET, difference
from texforce_ray.artifacts.snapshot import LoraShape, PolicySnapshot
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import read_adapter
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.fusion import fuse, update_of

Load = Callable[[], Backbone]

_SCALES: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 7},
    "rsLoRA": {"lora_alpha": 7, "use_rslora": True},
    "alpha_pattern": {"lora_alpha": 2, "alpha_pattern": {"layers.1.self_attn.q_proj": 9, "fc1": 1}},
    "rank_pattern": {"rank_pattern": {r"layers\.[12]\.mlp\.fc1": 5, "q_proj": 1}},
    "all of them": {
        "use_rslora": True,
        "rank_pattern": {"fc1": 3},
        "alpha_pattern": {"^encoder.layers.0.self_attn.q_proj": 5},
    },
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude_modules": {"exclude_modules": r".*layers\.0\..*"},
    "regular expression": {"target_modules": r".*\.[02]\.mlp\.fc1"},
}


@pytest.mark.long
@pytest.mark.parametrize("door", ["fuse", "evaluate --adapter"])
@pytest.mark.parametrize("form", ["PEFT", "diffusers"])
@pytest.mark.parametrize("scale", _SCALES)
def test_every_recorded_scale_is_applied(
    scale: str, form: str, door: str, tiny_backbone: Load, tmp_path: Path
) -> None:
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "fc1"]} | _SCALES[scale]
    torch.manual_seed(3)
    model = get_peft_model(
        tiny_backbone().text_encoder, LoraConfig(init_lora_weights=False, **settings)
    ).eval()
    if form == "PEFT":
        model.save_pretrained(tmp_path)
    else:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model)
        StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            text_encoder_lora_layers={
                k.removeprefix("base_model.model."): v for k, v in state.items()
            },
            text_encoder_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
    snapshot = read_adapter(tmp_path)
    if door == "fuse":
        snapshot = fuse([(1.0, snapshot)])
    backbone = tiny_backbone()
    Adapter(backbone, snapshot.shapes, seed=0).load_weights(snapshot.adapters)
    ids = backbone.tokenize(PROMPTS).ids[0]
    with torch.no_grad():
        expected, found = model(ids)[0], backbone.text_encoder(ids)[0]
        base = tiny_backbone().text_encoder(ids)[0]
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("door", ["evaluate --adapter", "model.denoiser_adapters"])
def test_kohya_alphas_of_each_layer_are_applied(
    door: str,
    make_policy: Callable[..., PolicySnapshot],
    tiny_pipeline: Path,
    stock_pipeline: Callable[[], StableDiffusionPipeline],
    stock_images: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    # On feed-forward layers; of attention's, stock diffusers 0.42 ignores all but the commonest.
    shape = LoraShape(3, 5.0, ("ff.net.0.proj", "ff.net.2"))
    file = lora_files.kohya(make_policy({"unet": shape}), tmp_path / "given")
    state = load_file(file)
    for index, key in enumerate(sorted(k for k in state if k.endswith(".alpha"))):
        state[key] = torch.tensor(0.5 + index % 5, dtype=torch.float16)
    name = min(k for k in state if k.endswith(".alpha")).removesuffix(".alpha")
    for end, cut in (("down", lambda t: t[:1]), ("up", lambda t: t[:, :1])):
        state[f"{name}.lora_{end}.weight"] = cut(state[f"{name}.lora_{end}.weight"]).contiguous()
    save_file(state, file)
    pipe = stock_pipeline()
    pipe.load_lora_weights(file)
    expected = stock_images(pipe, PROMPTS, SEEDS, **HOW)
    assert difference(DOORS[door](file, tiny_pipeline, tmp_path), expected) <= 1


def test_kohya_alphas_of_attention_layers_are_applied(
    make_policy: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    """Computed by hand, as PEFT says that it ignores what diffusers 0.42 makes of these alphas."""
    snapshot = make_policy({"text_encoder": TEXT, "unet": UNET})
    file = lora_files.kohya(snapshot, tmp_path / "given")
    state = load_file(file)
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state[f"lora_unet_{attention.replace('.', '_')}.alpha"] = torch.tensor(2.0)
    state["lora_te_text_model_encoder_layers_1_self_attn_q_proj.alpha"] = torch.tensor(1.0)
    del state["lora_te_text_model_encoder_layers_2_mlp_fc1.alpha"]  # then it is the rank
    save_file(state, file)
    alphas = {
        ("unet", attention): 2.0,
        ("text_encoder", "encoder.layers.1.self_attn.q_proj"): 1.0,
        ("text_encoder", "encoder.layers.2.mlp.fc1"): 4.0,
    }
    found = read_adapter(file)
    for part, shape in snapshot.shapes.items():
        whole = update_of(snapshot, part)
        for name, update in update_of(found, part).items():
            factor = alphas.get((part, name), shape.alpha) / shape.alpha
            np.testing.assert_allclose(update, whole[name] * factor, rtol=1e-5, atol=1e-6)


def test_two_scales_of_one_file_are_refused(
    make_policy: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    file = lora_files.kohya(make_policy({"unet": UNET}), tmp_path / "given")
    lora_files.with_metadata(file, {"unet.lora_alpha": 4, "unet.r": 3})
    with pytest.raises(ConfigError, match="gives its scale twice"):
        read_adapter(file)
