"""What is not plain LoRA is refused as what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.unit import lora_files
from tests.unit.lora_doors import UNET, through_denoiser_adapters, through_evaluate
from texforce_ray import fuse as command
from texforce_ray.artifacts.snapshot import PolicySnapshot
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter_files import export_adapter, read_adapter
from texforce_ray.model.backbone import Backbone

Load = Callable[[], Backbone]


def _kohya_variant(*keys: str) -> Callable[[PolicySnapshot, Path], Path]:
    def write(snapshot: PolicySnapshot, folder: Path) -> Path:
        file = lora_files.kohya(snapshot, folder)
        state = load_file(file)
        save_file(state | {key: torch.ones(2, 2) for key in keys}, file)
        return file

    return write


def _peft_variant(**settings: Any) -> Callable[[PolicySnapshot, Path], Path]:
    def write(snapshot: PolicySnapshot, folder: Path) -> Path:
        export_adapter(snapshot, folder, "base")
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return folder

    return write


_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
_VARIANTS = {
    "DoRA, kohya's": (_kohya_variant(f"{_Q}.dora_scale"), "is DoRA"),
    "LoHa": (_kohya_variant(f"{_Q}.hada_w1_a"), "is LoHa"),
    "LoKr": (_kohya_variant(f"{_Q}.lokr_w1"), "is LoKr"),
    "LoCon with Tucker decomposition": (_kohya_variant(f"{_Q}.lora_mid.weight"), "Tucker"),
    "whole differences (`.diff`)": (_kohya_variant(f"{_Q}.diff"), "whole weights' differences"),
    "layers of other models": (_kohya_variant("lora_te3_encoder.alpha"), "lora_te3_encoder"),
    "names that the converter mistakes": (
        _kohya_variant(
            *(
                f"lora_unet_add_embedding_linear_1.{e}"
                for e in ("lora_down.weight", "lora_up.weight")
            )
        ),
        "add_embedding",
    ),
    "DoRA, PEFT's": (_peft_variant(use_dora=True), "is DoRA.*use_dora"),
    "LoHa, PEFT's": (_peft_variant(peft_type="LOHA"), "is a LOHA adapter"),
    "trained biases": (_peft_variant(bias="all"), "trains biases"),
    "bias in B": (_peft_variant(lora_bias=True), "bias in B"),
    "whole modules (`modules_to_save`)": (
        _peft_variant(modules_to_save=["conv_in"]),
        "whole trained modules",
    ),
    "trained token embeddings": (
        _peft_variant(trainable_token_indices=[3]),
        "trained token embeddings",
    ),
    "PiSSA, OLoRA, LoftQ and other changed bases": (
        _peft_variant(init_lora_weights="pissa"),
        "pissa.*base model's own weights",
    ),
    "settings that are not known": (_peft_variant(use_twice=True), "sets use_twice to True"),
}


@pytest.mark.long
@pytest.mark.parametrize("variant", _VARIANTS)
def test_variants_are_refused_as_what_they_are(
    variant: str, make_policy: Callable[..., PolicySnapshot], tiny_pipeline: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write, message = _VARIANTS[variant]
    path = write(make_policy({"unet": UNET}), tmp_path / "given")
    with pytest.raises(ConfigError, match=message):
        through_evaluate(path, tiny_pipeline, tmp_path)
    with pytest.raises(ConfigError, match=rf"model\.denoiser_adapters.*{message}"):
        through_denoiser_adapters(path, tiny_pipeline, tmp_path)
    assert command.main([str(path), "--out", str(tmp_path / "out")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_the_page_says_what_is_tested_here() -> None:
    """docs/adapters.md has a row for each form and variant, with what each door makes of it."""
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines()
             if line.startswith("| ")]  # fmt: skip
    rows = {row[0]: row[1:] for row in cells if len(row) == 5}
    whole = ["yes", "yes", "its U-Net part", "yes"]
    assert {form: rows.get(form) for form in lora_files.WRITERS} == dict.fromkeys(
        lora_files.WRITERS, whole
    )
    rejected = {variant: rows.get(variant) for variant in _VARIANTS}
    assert rejected == dict.fromkeys(_VARIANTS, ["rejected"] * 4)


def test_what_stock_peft_saves_of_other_kinds_is_refused(
    tiny_backbone: Load, tmp_path: Path
) -> None:
    from peft import LoHaConfig

    for name, config in {
        "LOHA": LoHaConfig(r=2, target_modules=["q_proj"]),
        "token": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    }.items():
        get_peft_model(tiny_backbone().text_encoder, config).save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=name):
            read_adapter(tmp_path / name)
