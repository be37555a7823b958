"""What is exported loads in stock PEFT and stock diffusers, and draws the same images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from texforce_ray.artifacts.snapshot import LoraShape, PolicySnapshot
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import export_adapter, read_adapter
from texforce_ray.model.backbone import Backbone

SHAPE = LoraShape(4, 8.0, ("q_proj", "k_proj", "v_proj", "out_proj"))
SHAPES = {"text_encoder": SHAPE}
PROMPTS = ["a green circle", "two red squares", "a blue square"]
SEEDS = np.array([1, 22, 333])
HOW = {"steps": 4, "eta": 1.0, "guidance_scale": 3.0}

Load = Callable[[], Backbone]
Randomize = Callable[..., None]


@pytest.fixture
def tuned(tiny_backbone: Load, randomize: Randomize) -> tuple[Backbone, Adapter]:
    backbone = tiny_backbone()
    adapter = Adapter(backbone, SHAPES, seed=0)
    randomize(adapter, seed=5)
    return backbone, adapter


def _images(backbone: Backbone) -> np.ndarray:
    return Sampler(backbone, **HOW).sample(PROMPTS, SEEDS, 0)[1]


def _hidden(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad():
        return backbone.encode(backbone.tokenize(PROMPTS).ids).hidden


def _difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def _assert_same_snapshot(one: PolicySnapshot, other: PolicySnapshot) -> None:
    ours, theirs = one.adapters["text_encoder"], other.adapters["text_encoder"]
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype == np.float32
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)


def test_fresh_adapter_is_the_base_model(tiny_backbone: Load) -> None:
    backbone = tiny_backbone()
    base = _hidden(backbone)
    adapter = Adapter(backbone, SHAPES, seed=0)
    assert torch.equal(_hidden(backbone), base)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert len(adapter.parameters()) == 2 * 4 * 3
    assert sum(p.requires_grad for p in backbone.text_encoder.parameters()) == 24


def test_seed_decides_the_start_and_leaves_the_global_one_alone(tiny_backbone: Load) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one, same, other = (Adapter(tiny_backbone(), SHAPES, seed).snapshot(0) for seed in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected)
    _assert_same_snapshot(one, same)
    weights = other.adapters["text_encoder"].items()
    assert all((one.adapters["text_encoder"][k] != v).any() for k, v in weights if "lora_A" in k)


def _through_peft(pipe: StableDiffusionPipeline, directory: Path) -> None:
    pipe.text_encoder = PeftModel.from_pretrained(pipe.text_encoder, directory)


def _through_diffusers(pipe: StableDiffusionPipeline, directory: Path) -> None:
    pipe.load_lora_weights(directory)


@pytest.mark.parametrize("load", [_through_peft, _through_diffusers])
def test_stock_loaders_draw_what_the_policy_draws(
    tuned: tuple[Backbone, Adapter],
    stock_pipeline: Callable[[], StableDiffusionPipeline],
    stock_images: Callable[..., np.ndarray],
    tmp_path: Path,
    load: Callable[[StableDiffusionPipeline, Path], None],
) -> None:
    backbone, adapter = tuned
    live = _images(backbone)
    export_adapter(adapter.snapshot(3), tmp_path, "some/base")
    pipe = stock_pipeline()
    base = stock_images(pipe, PROMPTS, SEEDS, **HOW)
    load(pipe, tmp_path)
    ours = stock_images(pipe, PROMPTS, SEEDS, **HOW)
    assert _difference(ours, live) <= 1
    assert _difference(base, live) > 10
    with adapter.disabled():
        assert _difference(_images(backbone), base) <= 1


def test_exported_directory_names_its_base_and_settings(
    tuned: tuple[Backbone, Adapter], tmp_path: Path
) -> None:
    export_adapter(tuned[1].snapshot(0), tmp_path / "new" / "adapter", "some/base")
    config = json.loads((tmp_path / "new/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert sorted(config["target_modules"]) == sorted(SHAPE.target_modules)


def test_read_adapter_returns_the_same_bits(
    tuned: tuple[Backbone, Adapter], tiny_backbone: Load, tmp_path: Path
) -> None:
    backbone, adapter = tuned
    export_adapter(adapter.snapshot(0), tmp_path, "base")
    snapshot = read_adapter(tmp_path)
    _assert_same_snapshot(snapshot, adapter.snapshot(0))
    shape = snapshot.shapes["text_encoder"]
    assert (shape.rank, shape.alpha) == (SHAPE.rank, SHAPE.alpha)
    assert sorted(shape.target_modules) == sorted(SHAPE.target_modules)
    fresh = tiny_backbone()
    Adapter(fresh, snapshot.shapes, seed=99).load_weights(snapshot.adapters)
    assert torch.equal(_hidden(fresh), _hidden(backbone))


def test_snapshot_does_not_follow_the_policy(
    tuned: tuple[Backbone, Adapter], randomize: Randomize
) -> None:
    _, adapter = tuned
    snapshot, again = adapter.snapshot(1), adapter.snapshot(1)
    randomize(adapter, seed=6)
    _assert_same_snapshot(snapshot, again)
    adapter.load_weights(snapshot.adapters)
    _assert_same_snapshot(adapter.snapshot(1), again)
    for value in again.adapters["text_encoder"].values():
        value.fill(7)
    _assert_same_snapshot(adapter.snapshot(1), snapshot)


@pytest.mark.parametrize(
    "missing", ["everything", "adapter_config.json", "adapter_model.safetensors"]
)
def test_reading_what_is_no_adapter_says_what_it_should_hold(
    tuned: tuple[Backbone, Adapter], tmp_path: Path, missing: str
) -> None:
    if missing != "everything":
        export_adapter(tuned[1].snapshot(0), tmp_path, "base")
        (tmp_path / missing).unlink()
        (tmp_path / "pytorch_lora_weights.safetensors").unlink()  # which would do as well
    with pytest.raises(ConfigError, match=r"not an adapter.*adapter_config\.json") as caught:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("broken", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_adapter_is_named(
    tuned: tuple[Backbone, Adapter], tmp_path: Path, broken: str
) -> None:
    export_adapter(tuned[1].snapshot(0), tmp_path, "base")
    (tmp_path / broken).write_text("{ this is cut o")
    with pytest.raises(ConfigError) as caught:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.0\.self_attn\.[qv]_proj"},
        {"target_modules": ["q_proj", "fc1"], "use_rslora": True},
    ],
)
def test_adapter_saved_by_stock_peft_can_be_read(
    tiny_backbone: Load, tmp_path: Path, settings: dict
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_backbone().text_encoder,
        LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **settings),
    )
    model.save_pretrained(tmp_path)
    snapshot = read_adapter(tmp_path)
    backbone = tiny_backbone()
    Adapter(backbone, snapshot.shapes, seed=0).load_weights(snapshot.adapters)
    ids = backbone.tokenize(PROMPTS).ids[0]
    with torch.no_grad():
        assert torch.allclose(_hidden(backbone), model(ids)[0], atol=1e-6)


def test_an_adapter_that_is_no_plain_lora_is_refused(tiny_backbone: Load, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    encoder = tiny_backbone().text_encoder
    get_peft_model(
        encoder, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is DoRA \(it sets use_dora\), not a plain LoRA"):
        read_adapter(tmp_path)


def test_wrong_rank_is_named(tuned: tuple[Backbone, Adapter], tiny_backbone: Load) -> None:
    other = Adapter(
        tiny_backbone(), {"text_encoder": LoraShape(2, 8.0, SHAPE.target_modules)}, seed=0
    )
    before = other.snapshot(0)
    with pytest.raises(ConfigError, match=r"lora_[AB].*\(4, 96\).*\(2, 96\).*another rank"):
        other.load_weights(tuned[1].snapshot(0).adapters)
    _assert_same_snapshot(other.snapshot(0), before)


def test_other_layers_are_named(tuned: tuple[Backbone, Adapter], tiny_backbone: Load) -> None:
    other = Adapter(tiny_backbone(), {"text_encoder": LoraShape(4, 8.0, ("q_proj",))}, seed=0)
    layer = r"encoder\.layers\.0\.self_attn\.k_proj"
    with pytest.raises(ConfigError, match=rf"has 9 .*{layer}.* and 5 more.*target_modules"):
        other.load_weights(tuned[1].snapshot(0).adapters)
    with pytest.raises(ConfigError, match=rf"lacks 9 .*{layer}.* and 5 more"):
        tuned[1].load_weights(other.snapshot(0).adapters)


def test_unknown_target_modules_list_the_right_ones(tiny_backbone: Load) -> None:
    backbone = tiny_backbone()
    with pytest.raises(
        ConfigError, match=r"lora\.text_encoder\.target_modules: \['to_q'\]"
    ) as caught:
        Adapter(backbone, {"text_encoder": LoraShape(4, 4.0, ("to_q",))}, seed=0)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"):
        assert name in str(caught.value)


def test_disabled_is_the_base_model_and_only_for_a_while(
    tuned: tuple[Backbone, Adapter], tiny_backbone: Load
) -> None:
    backbone, adapter = tuned
    policy, base = _hidden(backbone), _hidden(tiny_backbone())
    with adapter.disabled():
        assert torch.equal(_hidden(backbone), base)
    assert torch.equal(_hidden(backbone), policy)
    assert not torch.equal(policy, base)
    assert all(p.requires_grad for p in adapter.parameters())
    with pytest.raises(KeyError), adapter.disabled():
        raise KeyError
    assert torch.equal(_hidden(backbone), policy)


def test_removed_adapter_leaves_the_base_model(
    tuned: tuple[Backbone, Adapter], tiny_backbone: Load, randomize: Randomize
) -> None:
    backbone, adapter = tuned
    policy, fresh = _hidden(backbone), tiny_backbone()
    adapter.remove()
    assert torch.equal(_hidden(backbone), _hidden(fresh))
    names = [name for name, _ in backbone.text_encoder.named_parameters()]
    assert names == [name for name, _ in fresh.text_encoder.named_parameters()]
    again = Adapter(
        backbone, {"text_encoder": LoraShape(SHAPE.rank, SHAPE.alpha, ("q_proj",))}, seed=0
    )
    assert len(again.parameters()) == 6
    again.remove()
    same = Adapter(backbone, SHAPES, seed=0)
    randomize(same, seed=5)
    assert torch.equal(_hidden(backbone), policy)


def test_half_precision_base_keeps_a_float32_adapter(
    tiny_pipeline: Path, randomize: Randomize
) -> None:
    from texforce_ray.model.backbone import load_backbone

    backbone = load_backbone(str(tiny_pipeline), dtype="bfloat16")
    adapter = Adapter(backbone, SHAPES, seed=0)
    randomize(adapter, seed=5)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    conditioning = backbone.encode(backbone.tokenize(PROMPTS).ids)
    conditioning.hidden.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_files_of_another_prefix_are_refused(
    tuned: tuple[Backbone, Adapter], tiny_backbone: Load, tmp_path: Path
) -> None:
    _, adapter = tuned
    export_adapter(adapter.snapshot(0), tmp_path, "base")
    path = tmp_path / "adapter_model.safetensors"
    tensors: dict[str, Any] = {f"unet.{k}": v for k, v in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="another model or target_modules"):
        Adapter(tiny_backbone(), SHAPES, seed=0).load_weights(read_adapter(tmp_path).adapters)
