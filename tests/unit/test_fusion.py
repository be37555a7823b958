"""Sums of adapters are sums of updates; what they give loads in stock libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel

from texforce_ray import fuse as command
from texforce_ray.artifacts.location import EMBEDDED_BASES, adapter_files, base_of
from texforce_ray.artifacts.snapshot import LoraShape, PolicySnapshot
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import export_adapter, read_adapter
from texforce_ray.model.backbone import Backbone, load_backbone
from texforce_ray.model.fusion import compress, fuse, update_of

TEXT = {"text_encoder": LoraShape(4, 8.0, ("q_proj", "v_proj"))}
OTHER_TEXT = {"text_encoder": LoraShape(2, 2.0, ("q_proj", "fc1"))}
UNET = {"unet": LoraShape(3, 6.0, ("to_q", "to_out.0"))}
PROMPTS = ["a green circle", "two red squares"]
SEEDS = np.array([1, 22])
HOW = {"steps": 4, "eta": 1.0, "guidance_scale": 3.0}


Make = Callable[..., PolicySnapshot]


@pytest.fixture
def make(tiny_backbone: Callable[[], Backbone], randomize: Callable[..., None]) -> Make:
    """Random adapters of given shapes."""

    def new(shapes: dict[str, LoraShape], seed: int) -> PolicySnapshot:
        adapter = Adapter(tiny_backbone(), shapes, seed=seed)
        randomize(adapter, seed=seed)
        return adapter.snapshot(0)

    return new


def _updates(adapter: PolicySnapshot, part: str = "text_encoder") -> dict[str, np.ndarray]:
    return update_of(adapter, part)


def _close(one: dict[str, np.ndarray], other: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], atol=atol, err_msg=name)


def test_weights_one_and_zero_give_either_adapter(make: Make) -> None:
    a, b = make(TEXT, 1), make(TEXT, 2)
    _close(_updates(fuse([(1.0, a), (0.0, b)])), _updates(a))
    _close(_updates(fuse([(0.0, a), (1.0, b)])), _updates(b))


def test_the_sum_is_that_of_the_updates_over_the_union_of_layers(make: Make) -> None:
    a, b = make(TEXT, 1), make(OTHER_TEXT, 2)
    fused = fuse([(0.75, a), (-2.0, b)])
    assert fused.shapes["text_encoder"].rank == 6
    ours, left, right = _updates(fused), _updates(a), _updates(b)
    assert ours.keys() == left.keys() | right.keys()
    zero = np.zeros(())
    expected = {n: 0.75 * left.get(n, zero) - 2.0 * right.get(n, zero) for n in ours}
    _close(ours, expected)


def test_averaging_the_factors_would_be_something_else(make: Make) -> None:
    """Why the exact sum is needed: the mean of As times the mean of Bs is not the mean update."""
    a, b = make(TEXT, 1), make(TEXT, 2)
    both = zip(a.adapters["text_encoder"].items(), b.adapters["text_encoder"].values(), strict=True)
    mean = PolicySnapshot(0, TEXT, {"text_encoder": {k: (x + y) / 2 for (k, x), y in both}})
    exact = _updates(fuse([(0.5, a), (0.5, b)]))
    assert any(np.abs(exact[n] - v).max() > 1e-3 for n, v in _updates(mean).items())


def test_compression_is_the_best_of_its_rank_and_says_what_it_lost(make: Make) -> None:
    fused = fuse([(1.0, make(TEXT, 1)), (1.0, make(TEXT, 2))])
    whole, error = compress(fused, 8)
    _close(_updates(whole), _updates(fused))
    assert error < 1e-6
    small, error = compress(fused, 2)
    assert small.shapes["text_encoder"].rank == 2
    lost = norm = 0.0
    for name, update in _updates(fused).items():
        values = np.linalg.svd(update.astype(np.float64), compute_uv=False)
        found = np.linalg.norm(_updates(small)[name] - update)
        assert found == pytest.approx(np.sqrt((values[2:] ** 2).sum()), rel=1e-4)
        lost, norm = lost + found**2, norm + (values**2).sum()
    assert error == pytest.approx(np.sqrt(lost / norm), rel=1e-4)


def test_layers_of_other_sizes_are_refused(make: Make) -> None:
    a = make(TEXT, 1)
    b = PolicySnapshot(
        0,
        a.shapes,
        {
            "text_encoder": {
                k: np.concatenate([v, v], 1) for k, v in a.adapters["text_encoder"].items()
            }
        },
    )
    with pytest.raises(ConfigError, match="different base models"):
        fuse([(1.0, a), (1.0, b)])


def _live(backbone: Backbone, snapshot: PolicySnapshot) -> np.ndarray:
    adapter = Adapter(backbone, snapshot.shapes, seed=0)
    adapter.load_weights(snapshot.adapters)
    images = Sampler(backbone, **HOW).sample(PROMPTS, SEEDS, 0)[1]
    adapter.remove()
    return images


def _difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.long
def test_text_and_denoiser_adapters_fused_load_in_stock_libraries(
    make: Make,
    tiny_backbone: Callable[[], Backbone],
    stock_pipeline: Callable[[], StableDiffusionPipeline],
    stock_images: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    text, unet = make(TEXT, 1), make(UNET, 2)
    export_adapter(text, tmp_path / "text", "base")
    export_adapter(unet, tmp_path / "unet", "base")
    out = tmp_path / "fused"
    given = [str(tmp_path / "text"), f"{tmp_path / 'unet'}*0.5", "--out", str(out)]
    assert command.main(given) == 0
    live = _live(tiny_backbone(), fuse([(1.0, text), (0.5, unet)]))
    assert _difference(live, _live(tiny_backbone(), text)) > 10
    assert _difference(live, _live(tiny_backbone(), unet)) > 10

    pipe = stock_pipeline()
    pipe.load_lora_weights(out)
    assert _difference(stock_images(pipe, PROMPTS, SEEDS, **HOW), live) <= 1
    pipe = stock_pipeline()
    pipe.text_encoder = PeftModel.from_pretrained(pipe.text_encoder, out / "text_encoder")
    pipe.unet = PeftModel.from_pretrained(pipe.unet, out / "unet")
    assert _difference(stock_images(pipe, PROMPTS, SEEDS, **HOW), live) <= 1
    # The diffusers file alone carries everything too.
    alone = read_adapter(out / "pytorch_lora_weights.safetensors")
    assert _difference(_live(tiny_backbone(), alone), live) <= 1


@pytest.mark.long
def test_the_command_merges_compresses_and_sweeps(
    make: Make, tiny_pipeline: Path, tiny_backbone: Callable[[], Backbone], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text, unet = make(TEXT, 1), make(UNET, 2)
    for name, adapter in (("text", text), ("unet", unet)):
        export_adapter(adapter, tmp_path / name, str(tiny_pipeline))
    out = tmp_path / "out"
    arguments = [
        f"{tmp_path / 'text'}*0.5", f"{tmp_path / 'unet'}", "--out", str(out), "--rank", "2",
        "--merge", str(tiny_pipeline), "--sweep", "2", "--steps", "2",
        "--prompts", "a green circle",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["rank"] == {"text_encoder": 2, "unet": 2}
    assert summary["exact_rank"] == {"text_encoder": 4, "unet": 3}
    assert 0 < summary["relative_error"] < 1
    blend, _ = compress(fuse([(0.5, text), (1.0, unet)]), 2)
    merged = load_backbone(str(out / "pipeline"))
    images = Sampler(merged, **HOW).sample(PROMPTS, SEEDS, 0)[1]
    assert _difference(images, _live(tiny_backbone(), blend)) <= 1
    assert (out / "sweep.png").stat().st_size > 1000


@pytest.mark.parametrize("shapes", [TEXT, {**TEXT, **UNET}], ids=["one-part", "two-parts"])
def test_an_adapter_of_the_replaced_weights_is_refused(
    make: Make, tmp_path: Path, shapes: dict[str, LoraShape]
) -> None:
    export_adapter(make(shapes, 1), tmp_path, "embedded")
    assert base_of(tmp_path) == "embedded"
    for file in tmp_path.rglob("adapter_config.json"):
        old = json.loads(file.read_text())
        assert old["base_model_name_or_path"] == EMBEDDED_BASES["embedded"]
        file.write_text(json.dumps(old | {"base_model_name_or_path": "embedded"}))
    for read in (read_adapter, adapter_files, base_of):
        with pytest.raises(ConfigError, match="earlier version of the embedded pipeline"):
            read(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "is not an adapter"),
        (["{text}*much"], "DIR*0.5"),
        (["{text}=0.5"], "a weight is written after a star: 'DIR*0.5'"),
        (["{text}", "--rank", "0"], "--rank"),
        (["{text}", "{other}"], "different base models"),
        (["{garbage}*2"], "damaged"),
    ],
)
def test_bad_input_is_one_clear_error(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    export_adapter(make(TEXT, 1), tmp_path / "text", "base")
    export_adapter(make(TEXT, 1), tmp_path / "other", "another-base")
    export_adapter(make(TEXT, 1), tmp_path / "garbage", "base")
    weights = tmp_path / "garbage" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    names = {n: str(tmp_path / n) for n in ("text", "other", "garbage")}
    given = [argument.format(**names) for argument in arguments]
    assert command.main([*given, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


# ---- frozen U-Nets and U-Net LoRAs of others -------------------------------------------------


def _unet_images(pipeline: Path, **options: object) -> np.ndarray:
    backbone = load_backbone(str(pipeline), **options)  # type: ignore[arg-type]
    return Sampler(backbone, **HOW).sample(PROMPTS, SEEDS, 0)[1]


@pytest.mark.long
@pytest.mark.parametrize("form", ["folder", "file", "attn_procs", "attn_procs_bin", "whole"])
def test_others_unets_and_unet_loras_stand_under_the_policy(
    make: Make, tiny_pipeline: Path, tiny_backbone: Callable[[], Backbone], tmp_path: Path,
    form: str,
) -> None:  # fmt: skip
    from safetensors.torch import save_file

    unet = make({"unet": LoraShape(2, 2.0, ("to_q", "to_out.0"))}, 3)
    expected = _live(tiny_backbone(), unet)
    export_adapter(unet, tmp_path / "lora", "base")
    options: dict[str, object] = {"denoiser_adapters": [str(tmp_path / "lora")]}
    if form == "file":
        file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
        options = {"denoiser_adapters": [str(file)]}
    elif form.startswith("attn_procs"):
        old = {}
        for key, value in unet.adapters["unet"].items():
            name, _, which = key.partition(".lora_")
            attention, _, layer = name.removesuffix(".0").rpartition(".")
            end = "down.weight" if which.startswith("A") else "up.weight"
            old[f"{attention}.processor.{layer}_lora.{end}"] = torch.from_numpy(value)
        binary = form.endswith("bin")
        file = tmp_path / ("pytorch_lora_weights.bin" if binary else "old.safetensors")
        torch.save(old, file) if binary else save_file(old, file)
        options = {"denoiser_adapters": [str(file)]}
    elif form == "whole":
        backbone = load_backbone(str(tiny_pipeline), **options)  # type: ignore[arg-type]
        backbone.denoiser.save_pretrained(tmp_path / "whole")
        options = {"denoiser": str(tmp_path / "whole")}
    images = _unet_images(tiny_pipeline, **options)
    assert _difference(images, expected) <= 1
    assert _difference(images, _unet_images(tiny_pipeline)) > 10


def test_what_does_not_fit_the_unet_is_refused(
    make: Make, tiny_pipeline: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    for name, layer in (("size", attention), ("place", "down_blocks.9.attn1")):
        tensors = {
            f"{layer}.processor.to_q_lora.down.weight": torch.ones(2, 7),
            f"{layer}.processor.to_q_lora.up.weight": torch.ones(5, 2),
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"0123456789")
    export_adapter(make(TEXT, 1), tmp_path / "text", "base")
    for name, message in (
        ("size.safetensors", "adapter of another model"),
        ("place.safetensors", "adapter of another model"),
        ("garbage.safetensors", "damaged"),
        ("text", "adapter of the text_encoder, not of the U-Net"),
        ("nowhere", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_backbone(str(tiny_pipeline), denoiser_adapters=[str(tmp_path / name)])
    with pytest.raises(ConfigError, match=r"model\.denoiser"):
        load_backbone(str(tiny_pipeline), denoiser=str(tmp_path / "nowhere"))
