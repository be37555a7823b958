"""Every LoRA form through every door, against what stock diffusers and PEFT make of the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.unit import lora_files
from texforce_ray import fuse as command
from texforce_ray.actors.rollout import RolloutActor
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import export_adapter, read_adapter
from texforce_ray.model.backbone import Backbone, load_backbone
from texforce_ray.model.fusion import compress, fuse, update_of
from texforce_ray.model.location import adapter_files, layers_per_block
from texforce_ray.model.lora_layers import rescaled
from texforce_ray.model.snapshot import LoraShape, PolicySnapshot

TEXT = LoraShape(4, 6.0, ("q_proj", "v_proj", "out_proj", "fc1"))
UNET = LoraShape(3, 5.0, ("to_q", "to_out.0"))
CONVOLUTIONS = LoraShape(2, 3.0, ("conv1", "proj_in", "conv_shortcut", "conv_in"))
PROMPTS = ["a green circle", "two red squares"]
SEEDS = np.array([1, 22])
HOW: dict[str, Any] = {"steps": 2, "eta": 1.0, "guidance_scale": 3.0}

Load = Callable[[], Backbone]
Snapshots = dict[str, PolicySnapshot]


@pytest.fixture
def make(tiny_backbone: Load, randomize: Callable[..., None]) -> Callable[..., PolicySnapshot]:
    def new(shapes: Mapping[str, LoraShape]) -> PolicySnapshot:
        adapter = Adapter(tiny_backbone(), shapes, seed=0)
        randomize(adapter, seed=5)
        return adapter.snapshot(0)

    return new


def _images(backbone: Backbone, snapshot: PolicySnapshot | None = None) -> np.ndarray:
    if snapshot is not None:
        Adapter(backbone, snapshot.shapes, seed=0).load(snapshot)
    return Sampler(backbone, **HOW).sample(PROMPTS, SEEDS, 0)[1]


def _difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# ---- doors -----------------------------------------------------------------------------------


def _through_fuse(path: Path, pipeline: Path, out: Path) -> np.ndarray:
    """The command's result."""
    assert command.main([f"{path}=1.0", "--base", str(pipeline), "--out", str(out)]) == 0
    return _images(load_backbone(str(pipeline)), read_adapter(out))


def _through_evaluate(path: Path, pipeline: Path, out: Path) -> np.ndarray:
    """Sent to a rollout actor, which attaches it."""
    backbone = load_backbone(str(pipeline))
    actor = RolloutActor.__new__(RolloutActor)
    actor.backbone = backbone
    _, snapshot = actor.load_policy([(1.0, str(path), adapter_files(path))])
    return _images(backbone, snapshot)


def _through_unet_adapters(path: Path, pipeline: Path, out: Path) -> np.ndarray:
    """Merged into the frozen U-Net."""
    return _images(load_backbone(str(pipeline), unet_adapters=[str(path)]))


def _through_init(path: Path, pipeline: Path, out: Path) -> np.ndarray:
    """Taken over by a policy of the same ranks and layers, with other alphas of its own."""
    snapshot = read_adapter(path, None, layers_per_block(str(pipeline)))
    own = {"text_encoder": TEXT, "unet": UNET}
    shapes = {p: replace(own[p], alpha=2 * own[p].alpha) for p in snapshot.adapters}
    return _images(load_backbone(str(pipeline)), rescaled(snapshot, shapes))


DOORS = {
    "fuse": _through_fuse,
    "evaluate --adapter": _through_evaluate,
    "lora.init": _through_init,
    "model.unet_adapters": _through_unet_adapters,
}


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


@pytest.mark.parametrize("form", lora_files.WRITERS)
def test_every_form_through_every_door(
    form: str,
    make: Callable[..., PolicySnapshot],
    tiny_pipeline: Path,
    stock_pipeline: Callable[[], StableDiffusionPipeline],
    stock_images: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    shapes = {"unet": UNET} if form == "attn_procs" else {"text_encoder": TEXT, "unet": UNET}
    snapshot = make(shapes)
    path = lora_files.WRITERS[form](snapshot, tmp_path / "given")
    pipe = stock_pipeline()
    base = stock_images(pipe, PROMPTS, SEEDS, **HOW)
    _stock(pipe, path, form)
    expected = stock_images(pipe, PROMPTS, SEEDS, **HOW)
    assert _difference(expected, base) > 10
    assert _difference(_images(load_backbone(str(tiny_pipeline)), snapshot), expected) <= 1
    for door in ("fuse", "evaluate --adapter", "lora.init"):
        images = DOORS[door](path, tiny_pipeline, tmp_path / "fused")
        assert _difference(images, expected) <= 1, door
    # There the U-Net's part alone is taken.
    alone = PolicySnapshot(0, {"unet": UNET}, {"unet": snapshot.adapters["unet"]})
    images = _through_unet_adapters(path, tiny_pipeline, tmp_path)
    assert _difference(images, _images(load_backbone(str(tiny_pipeline)), alone)) <= 1


@pytest.mark.parametrize("form", ["PEFT folder", "diffusers, new", "kohya", "kohya, LDM blocks"])
def test_convolutions_through_every_door(
    form: str,
    make: Callable[..., PolicySnapshot],
    tiny_pipeline: Path,
    stock_pipeline: Callable[[], StableDiffusionPipeline],
    stock_images: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    shape = CONVOLUTIONS
    if "LDM" in form:  # LDM's name of conv_in is no block's
        shape = LoraShape(2, 3.0, ("conv1", "proj_in", "conv_shortcut"))
    snapshot = make({"unet": shape})
    path = lora_files.WRITERS[form](snapshot, tmp_path / "given")
    pipe = stock_pipeline()
    if form == "PEFT folder":
        pipe.unet = PeftModel.from_pretrained(pipe.unet, path)
    else:
        pipe.load_lora_weights(path, unet_config=pipe.unet.config)
    expected = stock_images(pipe, PROMPTS, SEEDS, **HOW)
    for name in ("fuse", "evaluate --adapter", "model.unet_adapters"):
        images = DOORS[name](path, tiny_pipeline, tmp_path / "fused")
        assert _difference(images, expected) <= 1, name


def test_compression_keeps_convolutions(make: Callable[..., PolicySnapshot]) -> None:
    snapshot = make({"unet": CONVOLUTIONS})
    whole, error = compress(fuse([(1.0, snapshot)]), 2)
    assert error < 1e-6
    for name, update in update_of(snapshot, "unet").items():
        np.testing.assert_allclose(update_of(whole, "unet")[name], update, atol=1e-5)


# ---- scales ----------------------------------------------------------------------------------

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
    Adapter(backbone, snapshot.shapes, seed=0).load(snapshot)
    ids = backbone.tokenize(PROMPTS).ids[0]
    with torch.no_grad():
        expected, found = model(ids)[0], backbone.text_encoder(ids)[0]
        base = tiny_backbone().text_encoder(ids)[0]
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("door", ["evaluate --adapter", "model.unet_adapters"])
def test_kohya_alphas_of_each_layer_are_applied(
    door: str,
    make: Callable[..., PolicySnapshot],
    tiny_pipeline: Path,
    stock_pipeline: Callable[[], StableDiffusionPipeline],
    stock_images: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    # On feed-forward layers; of attention's, stock diffusers 0.42 ignores all but the commonest.
    shape = LoraShape(3, 5.0, ("ff.net.0.proj", "ff.net.2"))
    file = lora_files.kohya(make({"unet": shape}), tmp_path / "given")
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
    assert _difference(DOORS[door](file, tiny_pipeline, tmp_path), expected) <= 1


def test_kohya_alphas_of_attention_layers_are_applied(
    make: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    """Computed by hand, as PEFT says that it ignores what diffusers 0.42 makes of these alphas."""
    snapshot = make({"text_encoder": TEXT, "unet": UNET})
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
    make: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    file = lora_files.kohya(make({"unet": UNET}), tmp_path / "given")
    lora_files.with_metadata(file, {"unet.lora_alpha": 4, "unet.r": 3})
    with pytest.raises(ConfigError, match="says its scale twice"):
        read_adapter(file)


# ---- what is not plain LoRA ------------------------------------------------------------------


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


@pytest.mark.parametrize("variant", _VARIANTS)
def test_variants_are_refused_as_what_they_are(
    variant: str, make: Callable[..., PolicySnapshot], tiny_pipeline: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write, message = _VARIANTS[variant]
    path = write(make({"unet": UNET}), tmp_path / "given")
    with pytest.raises(ConfigError, match=message):
        _through_evaluate(path, tiny_pipeline, tmp_path)
    with pytest.raises(ConfigError, match=rf"model\.unet_adapters.*{message}"):
        _through_unet_adapters(path, tiny_pipeline, tmp_path)
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
    refused = {variant: rows.get(variant) for variant in _VARIANTS}
    assert refused == dict.fromkeys(_VARIANTS, ["refused"] * 4)


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


# ---- files of ours ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets", [("q_proj", "out_proj", "fc1"), ("q_proj", "v_proj"), ("fc2",), ("q_proj", "fc1")]
)
def test_kohya_file_draws_the_same_through_stock_diffusers(
    targets: tuple[str, ...],
    make: Callable[..., PolicySnapshot],
    tiny_backbone: Load,
    stock_pipeline: Callable[[], StableDiffusionPipeline],
    stock_images: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    snapshot = make({"text_encoder": LoraShape(4, 6.0, targets), "unet": UNET})
    export_adapter(snapshot, tmp_path, "base")
    pipe = stock_pipeline()
    pipe.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    live = _images(tiny_backbone(), snapshot)
    assert _difference(stock_images(pipe, PROMPTS, SEEDS, **HOW), live) <= 1
    again = read_adapter(tmp_path / "kohya.safetensors")
    for part, tensors in snapshot.adapters.items():
        assert again.adapters[part].keys() == tensors.keys()
        assert all(np.array_equal(again.adapters[part][k], v) for k, v in tensors.items())


def test_files_name_layers_as_old_and_new_readers_do(
    make: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    """transformers before 5.6 has `text_model.`; diffusers before 0.34 knows no alpha."""
    snapshot = make({"text_encoder": TEXT})
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
    make: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    snapshot = make({"text_encoder": TEXT, "unet": UNET})
    found = []
    for name in ("one", "other"):
        export_adapter(snapshot, tmp_path / name, "base")
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        found.append({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files})
    assert found[0] == found[1]
    metadata = [data[:200] for name, data in found[0].items() if name.endswith(".safetensors")]
    assert all(b'"__metadata__":{"format":"pt"}' in start for start in metadata)


def test_a_policy_loads_weights_of_either_layout(
    make: Callable[..., PolicySnapshot], tiny_backbone: Load
) -> None:
    snapshot = make({"text_encoder": TEXT})
    old = {f"text_model.{k}": v for k, v in snapshot.adapters["text_encoder"].items()}
    backbone = tiny_backbone()
    targets = tuple({key.partition(".lora_")[0] for key in old})
    adapter = Adapter(backbone, {"text_encoder": LoraShape(4, 6.0, targets)}, seed=1)
    adapter.load_weights({"text_encoder": old})
    again = adapter.snapshot(0).adapters["text_encoder"]
    assert all(np.array_equal(again[k], v) for k, v in snapshot.adapters["text_encoder"].items())


# ---- hub, paths, disks -----------------------------------------------------------------------


def test_a_hub_repository_is_read_from_its_cache(
    make: Callable[..., PolicySnapshot], tiny_pipeline: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from huggingface_hub.errors import LocalEntryNotFoundError

    from texforce_ray.model import frozen

    export_adapter(make({"unet": UNET}), tmp_path / "hub", "base")

    def download(repository: str, name: str) -> str:
        if repository == "some/lora" and (tmp_path / "hub" / name).is_file():
            return str(tmp_path / "hub" / name)
        raise LocalEntryNotFoundError("offline")

    def files(repository: str) -> list[str]:
        raise OSError("offline")

    monkeypatch.setattr(frozen, "hf_hub_download", download)
    monkeypatch.setattr(frozen, "list_repo_files", files)
    expected = _through_unet_adapters(tmp_path / "hub", tiny_pipeline, tmp_path)
    for removed in ("", "adapter_config.json"):
        if removed:
            (tmp_path / "hub" / removed).unlink()
        backbone = load_backbone(str(tiny_pipeline), unet_adapters=["some/lora"])
        assert _difference(_images(backbone), expected) <= 1
    with pytest.raises(ConfigError, match="no/lora is no path, and not to be had from the hub"):
        load_backbone(str(tiny_pipeline), unet_adapters=["no/lora"])


def test_one_base_under_several_names_is_one(
    make: Callable[..., PolicySnapshot], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sd15").mkdir()
    snapshot = make({"text_encoder": TEXT})
    names = [f"{tmp_path}/sd15", f"{tmp_path}/sd15/", f"{tmp_path}/./sd15", "runwayml/sd15"]
    for index, base in enumerate(names):
        export_adapter(snapshot, tmp_path / str(index), base)
    given = [str(tmp_path / str(index)) for index in range(4)]
    assert command.main([*given[:3], "--out", str(tmp_path / "out")]) == 0
    assert command.main([*given, "--out", str(tmp_path / "out")]) == 1
    assert "--base NAME" in capsys.readouterr().err
    arguments = [*given, "--base", "sd-legacy/sd15", "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sd-legacy/sd15"


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_files(
    make: Callable[..., PolicySnapshot], tiny_pipeline: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import errno
    import os

    from diffusers import DiffusionPipeline

    export_adapter(make({"text_encoder": TEXT}), tmp_path / "given", "base")
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
        assert command.main([f"{arguments[0]}=0.5", *arguments[1:]]) == 1
        error = capsys.readouterr().err
        assert "No space left" in error
        assert "Traceback" not in error
        monkeypatch.undo()
        if break_it.__code__.co_names[-1] == "fsync":
            assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert not list(out.glob(".*"))


def test_a_policy_of_another_rank_or_part_is_named(make: Callable[..., PolicySnapshot]) -> None:
    snapshot = make({"text_encoder": TEXT})
    with pytest.raises(ConfigError, match="text_encoder has rank 4, the policy rank 8"):
        rescaled(snapshot, {"text_encoder": replace(TEXT, rank=8)})
    with pytest.raises(ConfigError, match="on text_encoder, the policy on unet"):
        rescaled(snapshot, {"unet": UNET})


def test_results_of_other_parts_are_not_mixed(
    make: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    export_adapter(make({"text_encoder": TEXT, "unet": UNET}), tmp_path, "base")
    with pytest.raises(ConfigError, match="holds an adapter that would be read with the new one"):
        export_adapter(make({"text_encoder": TEXT}), tmp_path, "base")


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_parts_folder_says_which_part_it_is_wherever_it_is_sent(
    part: str, make: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    export_adapter(make({"text_encoder": TEXT, "unet": UNET}), tmp_path, "base")
    (tmp_path / part).rename(tmp_path / "text_encoder_2")
    names = adapter_files(tmp_path / "text_encoder_2")
    assert set(names) == {
        f"text_encoder_2/adapter_{n}" for n in ("config.json", "model.safetensors")
    }
