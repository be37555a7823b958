"""A pipeline's weights in one file, by the names that other programs give them (LDM's)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def write_single_file(pipeline: Path, file: Path) -> None:
    """Stable Diffusion 1.x of `pipeline` as one .safetensors file."""
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    attentive = {
        name.rpartition(".attentions.")[0]
        for name, _ in pipe.unet.named_modules()
        if ".attentions." in name
    }
    layers = pipe.unet.config.layers_per_block
    tensors = {
        f"model.diffusion_model.{_unet_key(key, layers, attentive)}": value
        for key, value in pipe.unet.state_dict().items()
    }
    levels = len(pipe.vae.config.block_out_channels)
    for key, value in pipe.vae.state_dict().items():
        tensors |= _vae_entry(key, value, levels)
    start = "cond_stage_model.transformer.text_model."
    for key, value in pipe.text_encoder.state_dict().items():
        tensors[start + key.removeprefix("text_model.")] = value
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)


def _unet_key(key: str, layers: int, attentive: set[str]) -> str:
    for ours, theirs in _UNET.items():
        if key.startswith(f"{ours}."):
            return _resnet(theirs + key.removeprefix(ours)) if "resnets" in ours else (
                theirs + key.removeprefix(ours)
            )  # fmt: skip
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    assert block is not None, key
    side, index, kind, place, rest = block.groups()
    number = (layers + 1) * int(index) + int(place)
    if side == "down" and kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (int(index) + 1)}.0.op.{rest.removeprefix('conv.')}"
    if side == "up" and kind == "upsamplers":
        after = 2 if f"up_blocks.{index}" in attentive else 1
        return f"output_blocks.{(layers + 1) * int(index) + layers}.{after}.{rest}"
    where = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
    return _resnet(f"{where}.0.{rest}") if kind == "resnets" else f"{where}.1.{rest}"


def _resnet(key: str) -> str:
    for ours, theirs in _RESNET.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key


def _vae_entry(key: str, value: Tensor, levels: int) -> dict[str, Any]:
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0" in key:
        for ours, theirs in _VAE_ATTENTION.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        key = key.replace("mid_block.attentions.0", "mid.attn_1")
        if key.endswith("weight") and ".norm." not in key:
            value = value[..., None, None]
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    mirrored = lambda m: str(levels - 1 - int(m[1]))  # noqa: E731
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{mirrored(m)}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{mirrored(m)}.upsample", key)
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    return {f"first_stage_model.{key}": value}
