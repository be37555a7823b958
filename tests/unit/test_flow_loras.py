"""LoRAs that others trained for a transformer are merged into it, whoever wrote the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.flow_miniatures import build
from texforce_ray import fuse
from texforce_ray.artifacts.snapshot import LoraShape
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import export_adapter, read_adapter
from texforce_ray.model.backbone import load_backbone
from texforce_ray.model.conditioning import Drawing

DRAWING = Drawing(64, 64, max_sequence_length=16)
PROMPTS, SEEDS = ["a green circle", "two red squares"], np.array([1, 2])


def _export(name: str, tmp_path: Path, targets: tuple[str, ...]) -> tuple[Path, Path]:
    """A miniature and an adapter of its transformer."""
    base, folder = tmp_path / "pipeline", tmp_path / "adapter"
    with torch.random.fork_rng(devices=[]):
        build(base, name)
    adapter = Adapter(
        load_backbone(str(base), drawing=DRAWING), {"transformer": LoraShape(3, 6.0, targets)}, 0
    )
    rng = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
    export_adapter(adapter.snapshot(0), folder, str(base), kohya=False)
    return base, folder


def _images(base: Path, *adapters: Path) -> np.ndarray:
    backbone = load_backbone(str(base), drawing=DRAWING, denoiser_adapters=list(map(str, adapters)))
    sampler = Sampler(backbone, steps=2, eta=0.0, guidance_scale=1.0)
    return sampler.sample(PROMPTS, SEEDS, 0)[1].astype(int)


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd35", "flux_dev", "z_image"])
@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_a_merged_adapter_draws_as_stock_diffusers_with_it(
    name: str, form: str, tmp_path: Path
) -> None:
    base, folder = _export(name, tmp_path, ("to_q", "to_v", "to_out.0"))
    given = folder
    if form == "diffusers":
        given = folder / "pytorch_lora_weights.safetensors"
    merged = _images(base, given)
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder)
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in SEEDS]
    scale = {"sd35": 1.0, "flux_dev": 1.0, "z_image": 1.0}[name]
    stock = pipe(
        list(PROMPTS), num_inference_steps=2, height=64, width=64, guidance_scale=scale,
        max_sequence_length=16, generator=generators, output_type="np",
    ).images  # fmt: skip
    assert np.abs(np.round(stock * 255) - merged).max() <= 1
    assert np.abs(merged - _images(base)).max() > 5


def _kohya(folder: Path) -> Path:
    """FLUX's own names, as kohya's scripts write them: projections of a block are fused."""
    state = load_file(folder / "pytorch_lora_weights.safetensors")
    written, block = {}, "transformer.transformer_blocks.0.attn."
    fused = (("to_q", "to_k", "to_v"), "img_attn_qkv"), (("add_q_proj", "add_k_proj",
             "add_v_proj"), "txt_attn_qkv")  # fmt: skip
    for names, own in fused:
        down = [state[f"{block}{name}.lora_A.weight"] for name in names]
        up = [state[f"{block}{name}.lora_B.weight"] for name in names]
        start = f"lora_unet_double_blocks_0_{own}"
        written[f"{start}.lora_down.weight"] = torch.cat(down)
        written[f"{start}.lora_up.weight"] = torch.block_diag(*up)
        written[f"{start}.alpha"] = torch.tensor(float(sum(len(d) for d in down)))
    out = folder.with_name("kohya.safetensors")
    save_file({key: value.contiguous() for key, value in written.items()}, out)
    return out


@pytest.mark.long
def test_kohyas_file_of_flux_is_the_same_adapter(tmp_path: Path) -> None:
    targets = tuple(
        f"transformer_blocks.0.attn.{name}"
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    )
    base, folder = _export("flux_dev", tmp_path, targets)
    assert np.abs(_images(base, folder) - _images(base, _kohya(folder))).max() <= 1


@pytest.mark.long
def test_fuse_reads_kohyas_file_of_flux_or_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = tuple(
        f"transformer_blocks.0.attn.{name}"
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    )
    base, folder = _export("flux_dev", tmp_path, targets)
    file, out = _kohya(folder), tmp_path / "out"
    assert fuse.main([str(file), "--base", str(base), "--out", str(out)]) == 0
    assert np.abs(_images(base, folder) - _images(base, out)).max() <= 1
    assert not (out / "kohya.safetensors").exists()
    assert fuse.main([str(file), "--base", "a/hub-id", "--out", str(tmp_path / "other")]) == 1
    assert "layers that are not understood: lora_unet_double" in capsys.readouterr().err


def test_an_adapter_with_a_projection_is_read_back_as_the_encoder_it_is_of(tmp_path: Path) -> None:
    base = tmp_path / "pipeline"
    build(base, "sd3")
    shapes = {"text_encoder": LoraShape(2, 2.0, ("q_proj", "text_projection"))}
    adapter = Adapter(load_backbone(str(base), drawing=DRAWING), shapes, 0)
    export_adapter(adapter.snapshot(0), tmp_path / "text", str(base), kohya=False)
    assert set(read_adapter(tmp_path / "text").adapters) == {"text_encoder"}


def test_what_the_converter_leaves_out_is_named(tmp_path: Path) -> None:
    base, folder = _export("flux_dev", tmp_path, ("to_q",))
    file = tmp_path / "other.safetensors"
    save_file(
        {
            f"lora_unet_input_blocks_1_1.lora_{end}.weight": torch.ones(2, 2)
            for end in ("up", "down")
        },
        file,
    )
    with pytest.raises(ConfigError, match=r"denoiser_adapters: .*FluxPipeline|understands 0 of 1"):
        _images(base, file)
    export = folder / "pytorch_lora_weights.safetensors"
    sd3 = tmp_path / "sd3"
    build(sd3, "sd3")
    with pytest.raises(ConfigError, match="is an adapter of another model"):
        _images(sd3, export)


def test_an_adapter_of_an_encoder_is_not_one_of_the_transformer(tmp_path: Path) -> None:
    base = tmp_path / "pipeline"
    build(base, "sd3")
    adapter = Adapter(
        load_backbone(str(base), drawing=DRAWING),
        {"text_encoder": LoraShape(2, 2.0, ("q_proj",))},
        0,
    )
    export_adapter(adapter.snapshot(0), tmp_path / "text", str(base), kohya=False)
    with pytest.raises(ConfigError, match="adapter of the text_encoder, not of the transformer"):
        _images(base, tmp_path / "text")


@pytest.mark.long
def test_a_merged_pipeline_has_the_adapter_of_every_part_in_it(tmp_path: Path) -> None:
    """T5's too, which no loader of diffusers reaches."""
    base, folder = tmp_path / "pipeline", tmp_path / "adapter"
    with torch.random.fork_rng(devices=[]):
        build(base, "sd3")
    backbone = load_backbone(str(base), drawing=DRAWING)
    shapes = {
        "text_encoder": LoraShape(2, 4.0, ("q_proj",)),
        "text_encoder_3": LoraShape(2, 4.0, ("q", "wo")),
        "transformer": LoraShape(2, 4.0, ("to_q",)),
    }
    adapter = Adapter(backbone, shapes, seed=0)
    rng = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
    snapshot = adapter.snapshot(0)
    export_adapter(snapshot, folder, str(base), kohya=False)
    live = Sampler(backbone, steps=2, eta=0.0, guidance_scale=1.0).sample(PROMPTS, SEEDS, 0)[1]
    assert fuse.main([str(folder), "--out", str(tmp_path / "out"), "--merge", str(base)]) == 0
    assert np.abs(_images(tmp_path / "out" / "pipeline") - live.astype(int)).max() <= 1
    assert not (tmp_path / "out" / "kohya.safetensors").exists()
    again = read_adapter(tmp_path / "out")
    for part, tensors in snapshot.adapters.items():
        assert again.adapters[part].keys() == tensors.keys()


@pytest.mark.long
def test_a_whole_transformer_of_others_replaces_the_pipelines(tmp_path: Path) -> None:
    base, other, third = tmp_path / "pipeline", tmp_path / "other", tmp_path / "flux"
    with torch.random.fork_rng(devices=[]):
        build(base, "sd3")
        build(third, "flux_dev")
    pipe = DiffusionPipeline.from_pretrained(base)
    for parameter in pipe.transformer.parameters():
        parameter.data *= 1.1
    pipe.transformer.save_pretrained(other)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in SEEDS]
    stock = pipe(
        list(PROMPTS), num_inference_steps=2, guidance_scale=1.0, max_sequence_length=16,
        generator=generators, output_type="np",
    ).images  # fmt: skip
    backbone = load_backbone(str(base), drawing=DRAWING, denoiser=str(other))
    _, ours = Sampler(backbone, steps=2, eta=0.0, guidance_scale=1.0).sample(PROMPTS, SEEDS, 0)
    assert np.abs(np.round(stock * 255) - ours).max() <= 1
    assert np.abs(ours - _images(base)).max() > 5
    with pytest.raises(ConfigError, match=r"model\.denoiser: "):
        load_backbone(str(base), drawing=DRAWING, denoiser=str(third))
