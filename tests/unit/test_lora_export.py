"""Our own LoRA files: what others make of them, and that they are written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from tests.unit.lora_doors import HOW, PROMPTS, SEEDS, TEXT, UNET, difference, draw
from texforce_ray import fuse as command
from texforce_ray.artifacts.snapshot import LoraShape, PolicySnapshot
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import export_adapter, read_adapter
from texforce_ray.model.backbone import Backbone

Load = Callable[[], Backbone]


@pytest.mark.long
@pytest.mark.parametrize(
    "targets", [("q_proj", "out_proj", "fc1"), ("q_proj", "v_proj"), ("fc2",), ("q_proj", "fc1")]
)
def test_kohya_file_draws_the_same_through_stock_diffusers(
    targets: tuple[str, ...],
    make_policy: Callable[..., PolicySnapshot],
    tiny_backbone: Load,
    stock_pipeline: Callable[[], StableDiffusionPipeline],
    stock_images: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    snapshot = make_policy({"text_encoder": LoraShape(4, 6.0, targets), "unet": UNET})
    export_adapter(snapshot, tmp_path, "base")
    pipe = stock_pipeline()
    pipe.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    live = draw(tiny_backbone(), snapshot)
    assert difference(stock_images(pipe, PROMPTS, SEEDS, **HOW), live) <= 1
    again = read_adapter(tmp_path / "kohya.safetensors")
    for part, tensors in snapshot.adapters.items():
        assert again.adapters[part].keys() == tensors.keys()
        assert all(np.array_equal(again.adapters[part][k], v) for k, v in tensors.items())


def test_files_name_layers_as_old_and_new_readers_do(
    make_policy: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    """transformers before 5.6 has `text_model.`; diffusers before 0.34 knows no alpha."""
    snapshot = make_policy({"text_encoder": TEXT})
    export_adapter(snapshot, tmp_path, "base")
    layer = "encoder.layers.0.mlp.fc1"
    peft = load_file(tmp_path / "adapter_model.safetensors")
    bare, old = (f"base_model.model.{p}{layer}.lora_B.weight" for p in ("", "text_model."))
    assert torch.equal(peft[bare], peft[old])
    diffusers = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("text_encoder.text_model.encoder.") for key in diffusers)
    b = diffusers[f"text_encoder.text_model.{layer}.lora_B.weight"]
    torch.testing.assert_close(b, peft[bare] * 6.0 / 4)
    known = set(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert known <= {
        "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
        "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
        "revision", "target_modules", "task_type", "use_dora", "use_rslora",
    }  # fmt: skip


def test_equal_adapters_give_equal_files(
    make_policy: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    snapshot = make_policy({"text_encoder": TEXT, "unet": UNET})
    found = []
    for name in ("one", "other"):
        export_adapter(snapshot, tmp_path / name, "base")
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        found.append({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files})
    assert found[0] == found[1]
    metadata = [data[:200] for name, data in found[0].items() if name.endswith(".safetensors")]
    assert all(b'"__metadata__":{"format":"pt"}' in start for start in metadata)


def test_a_policy_loads_weights_of_either_layout(
    make_policy: Callable[..., PolicySnapshot], tiny_backbone: Load
) -> None:
    snapshot = make_policy({"text_encoder": TEXT})
    old = {f"text_model.{k}": v for k, v in snapshot.adapters["text_encoder"].items()}
    backbone = tiny_backbone()
    targets = tuple({key.partition(".lora_")[0] for key in old})
    adapter = Adapter(backbone, {"text_encoder": LoraShape(4, 6.0, targets)}, seed=1)
    adapter.load_weights({"text_encoder": old})
    again = adapter.snapshot(0).adapters["text_encoder"]
    assert all(np.array_equal(again[k], v) for k, v in snapshot.adapters["text_encoder"].items())


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_files(
    make_policy: Callable[..., PolicySnapshot], tiny_pipeline: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import errno
    import os

    from diffusers import DiffusionPipeline

    export_adapter(make_policy({"text_encoder": TEXT}), tmp_path / "given", "base")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "given"), "--out", str(out), "--merge", str(tiny_pipeline)]
    assert command.main(arguments) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_: object, **__: object) -> None:
        raise full

    real = os.fsync
    count = 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > 8:
            raise full
        real(descriptor)

    for break_it in (
        lambda: monkeypatch.setattr(os, "fsync", fsync),
        lambda: monkeypatch.setattr(DiffusionPipeline, "save_pretrained", refuse),
    ):
        break_it()
        assert command.main([f"{arguments[0]}*0.5", *arguments[1:]]) == 1
        error = capsys.readouterr().err
        assert "No space left" in error
        assert "Traceback" not in error
        monkeypatch.undo()
        if break_it.__code__.co_names[-1] == "fsync":
            assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert not list(out.glob(".*"))


def test_results_of_other_parts_are_not_mixed(
    make_policy: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    export_adapter(make_policy({"text_encoder": TEXT, "unet": UNET}), tmp_path, "base")
    with pytest.raises(ConfigError, match="holds an adapter that would be read with the new one"):
        export_adapter(make_policy({"text_encoder": TEXT}), tmp_path, "base")
