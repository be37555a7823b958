"""Forms of LoRA files, told apart by keys: diffusers' old and new ones, attn_procs, kohya's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    UNET_TO_DIFFUSERS,
    convert_state_dict,
)
from safetensors import safe_open
from torch import Tensor

from texforce_ray.artifacts.families import FAMILIES
from texforce_ray.artifacts.snapshot import PARTS, TRANSFORMER, UNET, PolicySnapshot
from texforce_ray.errors import ConfigError
from texforce_ray.files import from_json
from texforce_ray.model.kohya import UNET_STARTS, check_names, from_kohya, is_kohya
from texforce_ray.model.lora_layers import (
    A,
    B,
    Layer,
    Layers,
    assemble,
    canonical,
    format_names,
    pair_layers,
)
from texforce_ray.model.peft_config import Scale, read_scale
from texforce_ray.model.transformer_loras import from_other_program

# diffusers' complete tables: its own functions guess one from some of the keys.
_TEXT_TO_PEFT = {
    **DIFFUSERS_OLD_TO_PEFT, **DIFFUSERS_TO_PEFT, ".lora.up": ".lora_B", ".lora.down": ".lora_A",
}  # fmt: skip
_UNET_TO_PEFT = {**UNET_TO_DIFFUSERS, ".lora_linear_layer.up": ".lora_B",
                 ".lora_linear_layer.down": ".lora_A"}  # fmt: skip
_METADATA = "lora_adapter_metadata"
# Parts of keys ($: at the end) that mark another kind of adapter, and what that is.
_VARIANTS = {
    "dora_scale": "DoRA (it has magnitudes)",
    "lora_magnitude_vector": "DoRA (it has magnitudes)",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".ia3_": "(IA)^3",
    ".on_input": "(IA)^3",
    ".lora_mid.": "LoCon with Tucker decomposition (it has lora_mid)",
    "lora_embedding_": "LoRA on embeddings",
    "trainable_tokens": "LoRA plus trained token embeddings",
    "modules_to_save": "LoRA plus whole trained modules",
    "bundle_emb.": "LoRA plus textual inversion embeddings",
    ".diff$": "a file of whole weights' differences",
    ".diff_b$": "a file of whole weights' differences",
    ".w_norm$": "LoRA plus trained norms",
    ".b_norm$": "LoRA plus trained norms",
    ".bias$": "LoRA that trains biases too",
}


def check_plain(keys: Mapping[str, Any], origin: str) -> None:
    """Check that all keys can be those of plain LoRA.

    Raises:
        ConfigError: they cannot; names what they are.
    """
    for mark, variant in _VARIANTS.items():
        if found := [key for key in keys if mark in f"{key}$"]:
            raise ConfigError(
                f"{origin} is {variant}: {format_names(found)}; only plain LoRA is supported; "
                "merge it into the base model with the tool that made it"
            )


def load_tensors(file: Path, origin: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and its metadata. Only tensors are read from pickles.

    Raises:
        ConfigError: damaged, or holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                return state, opened.metadata() or {}
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise anything
        words = str(error).strip().splitlines()
        raise ConfigError(
            f"{origin} holds a damaged adapter: {file.name}: {(words or [type(error).__name__])[0]}"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    tensors = isinstance(loaded, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    )
    if not tensors:
        raise ConfigError(f"{origin}: {file.name} is not a mapping from names to tensors")
    return dict(loaded), {}


def arrays(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: value.float().numpy() for key, value in state.items()}


def read_file(
    file: Path, origin: str, layers_per_block: int = 2, *, pipeline: str | None = None
) -> PolicySnapshot:
    """Read a LoRA file of any form.

    Args:
        file: the file.
        origin: its name in errors.
        layers_per_block: the U-Net's; needed for LDM's block names. Every published Stable
            Diffusion has 2.
        pipeline: diffusers' class, whose converter reads other programs' files of a transformer.

    Raises:
        ConfigError: damaged, or of a form or kind that is not understood; names it.
    """
    state, metadata = load_tensors(file, origin)
    if not state:
        raise ConfigError(f"{origin} holds no tensors")
    check_plain(state, origin)
    alphas: dict[str, float] = {}
    family = FAMILIES.get(pipeline or "")
    if family is not None and pipeline is not None and family.denoiser == TRANSFORMER:
        state = from_other_program(state, pipeline, origin)
    kohya = state if is_kohya(state) else None
    if kohya is not None:
        state, alphas = from_kohya(kohya, origin, layers_per_block)
    else:
        state, alphas = _split_alphas(state, origin)
    parts = _by_part(state, origin)
    named = {part: _convert(part, tensors) for part, tensors in parts.items()}
    wanted = _alphas_by_layer(alphas, named, origin)
    scales = _scales(metadata, origin)
    if wanted and scales:
        raise ConfigError(f"{origin} gives its scale twice, in {_METADATA} and in {min(wanted)}")
    read: dict[str, tuple[Layers, None]] = {}
    for part, tensors in named.items():
        pairs = pair_layers(part, arrays(tensors), origin)
        layers = {}
        for name, pair in pairs.items():
            if kohya is not None and not pair[A].any() and not pair[B].any():
                continue  # a marker without effect, as `to_kohya` writes it
            rank = pair[A].shape[0]
            alpha = scales[part].alpha_of(name, rank) if part in scales else float(rank)
            layers[name] = Layer(pair[A], pair[B], wanted.get(f"{part}.{name}", alpha))
        read[part] = layers, None
    if kohya is not None:
        check_names({part: _layer_names(tensors) for part, tensors in named.items()}, kohya, origin)
    if not all(layers for layers, _ in read.values()):
        raise ConfigError(f"{origin} holds nothing but zeros")
    return assemble(read)


def _layer_names(tensors: Mapping[str, Tensor]) -> set[str]:
    return {key.removesuffix(A) for key in tensors if key.endswith(A)}


def _split_alphas(
    state: Mapping[str, Tensor], origin: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    alphas = {}
    for key, value in state.items():
        if key.endswith(".alpha"):
            if value.numel() != 1 or not torch.isfinite(value.float()).all():
                raise ConfigError(f"{origin}: {key} is not a number")
            alphas[key] = float(value)
    return {key: value for key, value in state.items() if key not in alphas}, alphas


def _by_part(state: Mapping[str, Tensor], origin: str) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in state.items():
        part = next((part for part in PARTS if key.startswith(f"{part}.")), None)
        if part is None and key.startswith(UNET_STARTS):
            part = UNET
        if part is None:
            unknown.append(key)
        else:
            parts.setdefault(part, {})[key.removeprefix(f"{part}.")] = value
    if unknown:
        hint = (
            "; it is PEFT's weights file: give its folder, whose adapter_config.json has the scale"
            if all(key.startswith("base_model.model.") for key in unknown)
            else f"; only keys of {', '.join(PARTS)} are"
        )
        raise ConfigError(f"{origin}: keys that are not understood: {format_names(unknown)}{hint}")
    return {part: parts[part] for part in PARTS if part in parts}


def _convert(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Any of diffusers' forms to PEFT's keys."""
    table = _UNET_TO_PEFT if part == UNET else _TEXT_TO_PEFT
    plain = {key: value for key, value in tensors.items() if key.endswith((A, B))}
    rest = {key: value for key, value in tensors.items() if key not in plain}
    return {**convert_state_dict(plain, {}), **convert_state_dict(rest, table)}


def _alphas_by_layer(
    alphas: Mapping[str, float], named: Mapping[str, Mapping[str, Tensor]], origin: str
) -> dict[str, float]:
    """Alphas by part and layer; files name them after a layer's old name or a tensor."""
    found = {}
    for key, alpha in alphas.items():
        part, name = _part_of(key.removesuffix(".alpha"))
        forms = (name, f"{name}.down.weight", f"{name}.lora.down.weight", f"{name}{A}",
                 f"{name}.lora_linear_layer.down.weight")  # fmt: skip
        for form in forms:
            (converted,) = _convert(part, {form: torch.empty(0)})
            if converted.endswith(A) and converted in named.get(part, {}):
                found[f"{part}.{canonical(part, converted.removesuffix(A))}"] = alpha
                break
        else:
            raise ConfigError(f"{origin}: {key} is a scale, but the file has no such layer")
    return found


def _part_of(key: str) -> tuple[str, str]:
    part = next((part for part in PARTS if key.startswith(f"{part}.")), UNET)
    return part, key.removeprefix(f"{part}.")


def _scales(metadata: Mapping[str, str], origin: str) -> dict[str, Scale]:
    """Each part's scale in diffusers' metadata."""
    if _METADATA not in metadata:
        return {}
    try:
        flat = from_json(metadata[_METADATA])
        configs = {
            part: {
                k.removeprefix(f"{part}."): v for k, v in flat.items() if k.startswith(f"{part}.")
            }
            for part in PARTS
        }
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{origin} holds a damaged adapter: {_METADATA}: {error}") from error
    return {
        part: read_scale(config, f"{origin} ({part})") for part, config in configs.items() if config
    }
