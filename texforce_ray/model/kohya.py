"""LoRA files of kohya's scripts, which A1111, Forge, ComfyUI and others read and write."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from torch import Tensor

from texforce_ray.artifacts.snapshot import (
    TEXT_ENCODERS,
    UNET,
    LoraShape,
    PolicySnapshot,
    Tensors,
)
from texforce_ray.errors import ConfigError
from texforce_ray.model.lora_layers import A, B, format_names, of_clip, prefixed

PREFIXES = ("lora_te_", "lora_te1_", "lora_te2_", "lora_unet_")
_ENDS = (".lora_down.weight", ".lora_up.weight", ".alpha")
UNET_STARTS = (
    "down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.",
    "add_embedding.",
)  # fmt: skip
_LDM = ("input_blocks", "middle_block", "output_blocks")
_DIFFUSERS = ("down_blocks", "mid_block", "up_blocks")


def is_kohya(keys: Mapping[str, Any]) -> bool:
    return any(key.startswith(PREFIXES) for key in keys)


def from_kohya(
    state: Mapping[str, Tensor], origin: str, layers_per_block: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The state and the alphas under diffusers' names, by diffusers' own converter.

    Raises:
        ConfigError: names keys that are not understood.
    """
    renamed = {_classic(key): value for key, value in state.items()}
    layers = _layers(renamed, origin)
    ldm = {name for name in layers if any(part in name for part in _LDM)}
    if ldm and any(part in name for name in layers for part in _DIFFUSERS):
        raise ConfigError(
            f"{origin} mixes names of U-Net blocks: {min(ldm)} is LDM's, others are diffusers'"
        )
    try:
        config = SimpleNamespace(layers_per_block=layers_per_block)
        # Both remove the tensors from their argument.
        mapped = _maybe_map_sgm_blocks_to_diffusers(dict(renamed), config)
        converted, alphas = _convert_non_diffusers_lora_to_diffusers(mapped)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"{origin}: its layers are not those of Stable Diffusion: {str(error)[:200]}"
        ) from error
    if len(converted) != 2 * len(layers):
        raise ConfigError(f"{origin}: two of its layers have the same name in diffusers")
    return converted, alphas


def _classic(key: str) -> str:
    """Kohya's key; some trainers write PEFT's A and B after kohya's names."""
    for end, classic in ((A, _ENDS[0]), (B, _ENDS[1])):
        if key.endswith(end):
            return key.removesuffix(end) + classic
    return key


def _layers(state: Mapping[str, Tensor], origin: str) -> set[str]:
    if unknown := [key for key in state if not key.startswith(PREFIXES) or not key.endswith(_ENDS)]:
        raise ConfigError(
            f"{origin}: keys that are not understood: {format_names(unknown)}; keys of such a file "
            f"start with {', '.join(PREFIXES)} and end with {', '.join(_ENDS)}"
        )
    layers = {key.partition(".")[0] for key in state}
    for name in sorted(layers):
        if missing := [end for end in _ENDS[:2] if name + end not in state]:
            raise ConfigError(f"{origin} holds a damaged adapter: {name}{missing[0]} is missing")
    return layers


def check_names(names: Mapping[str, set[str]], state: Mapping[str, Tensor], origin: str) -> None:
    """Check that the converter understood every layer: writing it again gives the same name.

    Files with LDM's block names are not checked: those are renamed by design.

    Raises:
        ConfigError: names layers that it did not understand.
    """
    written = {kohya_name(part, name, xl) for part in names for name in names[part]
               for xl in (False, True)}  # fmt: skip
    layers = {key.partition(".")[0] for key in state}
    if any(part in name for name in layers for part in _LDM):
        return
    foreign = {
        kohya_name(UNET, name, False)
        for name in names.get(UNET, ())
        if not f"{name}.".startswith(UNET_STARTS)
    }
    if unknown := (layers - written) | foreign:
        raise ConfigError(f"{origin}: layers that are not understood: {format_names(unknown)}")


def kohya_name(part: str, layer: str, xl: bool) -> str:
    """`lora_te_text_model_encoder_layers_0_self_attn_q_proj` and the like."""
    first = "lora_te1_" if xl else "lora_te_"
    start = {"text_encoder": first, "text_encoder_2": "lora_te2_", UNET: "lora_unet_"}[part]
    return start + prefixed(part, layer).replace(".", "_")


def has_kohya_names(snapshot: PolicySnapshot) -> bool:
    """Whether all layers are Stable Diffusion's or SDXL's, which alone have such names here."""
    return all(
        part == UNET or (part in TEXT_ENCODERS[:2] and all(of_clip(part, key) for key in tensors))
        for part, tensors in snapshot.adapters.items()
    )


def to_kohya(snapshot: PolicySnapshot) -> Tensors:
    """The snapshot's tensors as kohya's scripts name them."""
    xl = "text_encoder_2" in snapshot.adapters
    tensors: Tensors = {}
    for part, adapter in snapshot.adapters.items():
        shape = snapshot.shapes[part]
        for key, value in adapter.items():
            end = A if key.endswith(A) else B
            name = kohya_name(part, key.removesuffix(end), xl)
            tensors[name + (_ENDS[0] if end == A else _ENDS[1])] = value
            tensors[name + _ENDS[2]] = np.array(shape.alpha, dtype=np.float32)
        tensors |= _marker(part, adapter, shape, xl)
    return tensors


def _marker(part: str, adapter: Tensors, shape: LoraShape, xl: bool) -> Tensors:
    """A layer of zeros on an output projection, if a text encoder's adapter has none.

    diffusers recognises kohya's attention layers only by `out_proj`: without one, it ignores all
    the others with a warning (0.42), or raises.
    """
    names = [key.removesuffix(A) for key in adapter if key.endswith(A)]
    attention = [name for name in names if name.endswith(("q_proj", "k_proj", "v_proj"))]
    if part == UNET or not attention or any(name.endswith("out_proj") for name in names):
        return {}
    width = adapter[attention[0] + A].shape[1]
    name = kohya_name(part, attention[0].rpartition(".")[0] + ".out_proj", xl)
    rank = adapter[attention[0] + A].shape[0]
    return {
        name + _ENDS[0]: np.zeros((rank, width), dtype=np.float32),
        name + _ENDS[1]: np.zeros((width, rank), dtype=np.float32),
        # The others' scale: diffusers misreads differing scales of a text encoder.
        name + _ENDS[2]: np.array(shape.alpha, dtype=np.float32),
    }
