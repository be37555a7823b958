"""LoRA files as the tools of several years write them, made from one snapshot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    convert_state_dict_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from texforce_ray.artifacts.snapshot import PolicySnapshot
from texforce_ray.model.adapter_files import export_adapter

Write = Callable[[PolicySnapshot, Path], Path]
_A, _B = ".lora_A.weight", ".lora_B.weight"


def tensors(snapshot: PolicySnapshot, part: str, prefix: str = "text_model.") -> dict[str, Tensor]:
    """A part's tensors with the prefix that CLIP's layers had, alpha / r in B."""
    start = prefix if part == "text_encoder" else ""
    scale = snapshot.shapes[part].alpha / snapshot.shapes[part].rank
    return {
        start + key: torch.from_numpy(value.copy()) * (scale if key.endswith(_B) else 1.0)
        for key, value in snapshot.adapters[part].items()
    }


def peft(snapshot: PolicySnapshot, folder: Path) -> Path:
    """PEFT's folder of today: no prefix, alpha in the config."""
    export_adapter(snapshot, folder, "embedded")
    for file in folder.rglob("adapter_model.safetensors"):
        save_file({k: v for k, v in load_file(file).items() if "text_model." not in k}, file)
    _remove_flat(folder)
    return folder


def peft_old(snapshot: PolicySnapshot, folder: Path) -> Path:
    """PEFT's folder of 2023, as TexForce's own weights: prefix, a pickle."""
    export_adapter(snapshot, folder, "embedded")
    for file in folder.rglob("adapter_model.safetensors"):
        both = load_file(file)
        prefix = any("text_model." in key for key in both)
        old = {k: v for k, v in both.items() if not prefix or "text_model." in k}
        torch.save(old, file.with_suffix(".bin"))
        file.unlink()
    _remove_flat(folder)
    return folder


def _remove_flat(folder: Path) -> None:
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        (folder / name).unlink()


def diffusers_new(snapshot: PolicySnapshot, folder: Path) -> Path:
    """diffusers 0.34 and later: PEFT's keys, the config in the metadata."""
    from peft import LoraConfig

    layers = {}
    for part, shape in snapshot.shapes.items():
        layers[f"{part}_lora_layers"] = {
            k: torch.from_numpy(v.copy()) for k, v in snapshot.adapters[part].items()
        }
        config = LoraConfig(
            r=shape.rank, lora_alpha=shape.alpha, target_modules=list(shape.target_modules)
        )
        layers[f"{part}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder


def diffusers_2023(snapshot: PolicySnapshot, folder: Path) -> Path:
    """diffusers 0.22 to 0.33: `lora_linear_layer.up` and `lora.up`."""
    state = {}
    for part in snapshot.adapters:
        found = tensors(snapshot, part)
        if part == "text_encoder":
            named = convert_state_dict_to_diffusers(found)
        else:
            named = {k.replace(_A, ".lora.down.weight").replace(_B, ".lora.up.weight"): v
                     for k, v in found.items()}  # fmt: skip
        state |= {f"{part}.{key}": value for key, value in named.items()}
    folder.mkdir()
    save_file(state, folder / "pytorch_lora_weights.safetensors")
    return folder / "pytorch_lora_weights.safetensors"


def diffusers_old(snapshot: PolicySnapshot, folder: Path) -> Path:
    """diffusers up to 0.21: `to_q_lora.up` in both parts."""
    to_old = {new: old for old, new in DIFFUSERS_OLD_TO_PEFT.items()}
    state = {}
    for part in snapshot.adapters:
        for key, value in tensors(snapshot, part).items():
            if part == "text_encoder":
                end = next((e for e in to_old if "_proj" in e and e in key), None) or next(
                    e for e in to_old if e in key
                )
                state[f"{part}.{key.replace(end, to_old[end])}"] = value
            else:
                state[f"unet.{_processor(key)}"] = value
    folder.mkdir()
    save_file(state, folder / "old.safetensors")
    return folder / "old.safetensors"


def _processor(key: str) -> str:
    name, _, which = key.partition(".lora_")
    attention, _, layer = name.removesuffix(".0").rpartition(".")
    return f"{attention}.processor.{layer}_lora.{'down' if which.startswith('A') else 'up'}.weight"


def attn_procs(snapshot: PolicySnapshot, folder: Path) -> Path:
    """diffusers 0.14 to 0.20, of the U-Net alone: a pickle without the part's name."""
    folder.mkdir()
    file = folder / "pytorch_lora_weights.bin"
    torch.save({_processor(k): v for k, v in tensors(snapshot, "unet").items()}, file)
    return file


def kohya(snapshot: PolicySnapshot, folder: Path) -> Path:
    """kohya's scripts, with diffusers' names of blocks."""
    folder.mkdir()
    file = folder / "any name.safetensors"
    save_file(_kohya(snapshot, lambda name: name), file)
    return file


def kohya_ldm(snapshot: PolicySnapshot, folder: Path) -> Path:
    """The same with LDM's names of blocks, of a U-Net with one layer per block."""
    folder.mkdir()
    file = folder / "ldm.safetensors"
    save_file(_kohya(snapshot, _ldm), file)
    return file


def _kohya(snapshot: PolicySnapshot, rename: Callable[[str], str]) -> dict[str, Tensor]:
    state = {}
    for part, shape in snapshot.shapes.items():
        start = {"text_encoder": "lora_te_text_model.", "unet": "lora_unet_"}[part]
        for key, value in snapshot.adapters[part].items():
            name = key.removesuffix(_A).removesuffix(_B)
            name = start + (rename(name) if part == "unet" else name)
            end = ".lora_down.weight" if key.endswith(_A) else ".lora_up.weight"
            state[name.replace(".", "_") + end] = torch.from_numpy(value.copy())
            state[name.replace(".", "_") + ".alpha"] = torch.tensor(shape.alpha)
    return state


def _ldm(name: str) -> str:
    for ours, theirs in (("conv1", "in_layers.2"), ("conv2", "out_layers.3"),
                         ("time_emb_proj", "emb_layers.1"),
                         ("conv_shortcut", "skip_connection")):  # fmt: skip
        name = name.replace(ours, theirs)
    block, first, rest = name.split(".", 2)
    if block == "mid_block":
        index, rest = rest.split(".", 1)
        return f"middle_block.{1 if first == 'attentions' else 2 * int(index)}.{rest}"
    kind, index, rest = rest.split(".", 2)
    inner = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
    if block == "up_blocks":
        place = 2 * int(first) + (1 if kind == "upsamplers" else int(index))
        return f"output_blocks.{place}.{inner}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{2 * int(first) + 2}.0.op"
    return f"input_blocks.{1 + 2 * int(first) + int(index)}.{inner}.{rest}"


def with_metadata(file: Path, config: dict[str, object]) -> None:
    """Write what diffusers notes of an adapter into a file's metadata."""
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(config)})


WRITERS: dict[str, Write] = {
    "PEFT folder": peft,
    "PEFT folder, .bin": peft_old,
    "diffusers, new": diffusers_new,
    "diffusers, 0.22": diffusers_2023,
    "diffusers, 0.21": diffusers_old,
    "attn_procs": attn_procs,
    "kohya": kohya,
    "kohya, LDM blocks": kohya_ldm,
}
