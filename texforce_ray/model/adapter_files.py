"""Adapters as files: directories that stock PEFT, stock diffusers and kohya's readers load."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from texforce_ray.artifacts.location import (
    DIFFUSERS_FILE,
    KOHYA_FILE,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    find_adapter,
    recorded_name,
)
from texforce_ray.artifacts.snapshot import (
    DENOISERS,
    PARTS,
    TEXT_ENCODERS,
    TRANSFORMER,
    UNET,
    PolicySnapshot,
    Tensors,
)
from texforce_ray.errors import ConfigError
from texforce_ray.files import atomic_write_bytes, from_json, write_error
from texforce_ray.model.kohya import has_kohya_names, to_kohya
from texforce_ray.model.lora_formats import arrays, check_plain, load_tensors, read_file
from texforce_ray.model.lora_layers import (
    A,
    B,
    Layer,
    Layers,
    assemble,
    canonical,
    of_clip,
    pair_layers,
    prefixed,
)
from texforce_ray.model.peft_config import portable_config, read_scale, target_names

_PEFT_START = "base_model.model."
# Layers of transformers that are not in "transformer_blocks"; Z-Image's blocks are "layers".
_TRANSFORMER = (
    "context_embedder.", "proj_out.", "norm_out.", "time_text_embed.", "x_embedder.",
    "noise_refiner.", "context_refiner.", "cap_embedder.",
)  # fmt: skip
_PROJECTED = "CLIPTextModelWithProjection"


def export_adapter(
    snapshot: PolicySnapshot, directory: Path, base: str, *, kohya: bool = True
) -> None:
    """Write one directory that stock PEFT, stock diffusers and kohya's readers load.

    `adapter_config.json` + `adapter_model.safetensors` for `PeftModel.from_pretrained`, in the
    directory itself for one part, and in one folder per part if there are several;
    `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`; `kohya.safetensors` for A1111,
    ComfyUI and the like. Equal snapshots give equal bytes.

    diffusers loads no LoRA of text encoders other than CLIP's (T5, language models): those have
    PEFT's files alone.

    Args:
        snapshot: the adapter.
        directory: created if missing.
        base: the base model that it records.
        kohya: whether to write kohya's file too, whose names are Stable Diffusion's and SDXL's.

    Raises:
        RunDirectoryError: a file cannot be written.
        ConfigError: the directory holds another adapter, on parts that this one lacks.
    """
    diffusers: Tensors = {}
    files: dict[str, bytes] = {}
    for part, tensors in snapshot.adapters.items():
        # In the directory itself, another text encoder would be taken for the first, and one with
        # a projection for SDXL's second.
        projected = any(key.startswith("text_projection") for key in tensors)
        alone = len(snapshot.adapters) == 1 and part not in TEXT_ENCODERS[1:] and not projected
        folder = "" if alone else f"{part}/"
        shape = snapshot.shapes[part]
        config = portable_config(shape.rank, shape.alpha, shape.target_modules, recorded_name(base))
        files[folder + PEFT_CONFIG] = json.dumps(config, indent=2).encode() + b"\n"
        files[folder + PEFT_WEIGHTS] = _bytes(_peft_tensors(part, tensors))
        # diffusers before 0.34 ignores the scale: put alpha / r into B, so that it is 1.
        scale = np.float32(shape.alpha / shape.rank)
        diffusers |= {
            f"{part}.{prefixed(part, key)}": value * scale if key.endswith(B) else value
            for key, value in tensors.items()
            if part in DENOISERS or of_clip(part, key)
        }
    if diffusers:
        files[DIFFUSERS_FILE] = _bytes(diffusers)
    if kohya and has_kohya_names(snapshot):
        files[KOHYA_FILE] = _bytes(to_kohya(snapshot))
    _write(directory, files)


def _peft_tensors(part: str, tensors: Tensors) -> Tensors:
    """CLIPTextModel's tensors under both names: PEFT knows one with transformers 5.6 and later, the
    other with older ones, and ignores the one that it does not know."""
    names = (canonical, prefixed) if part in TEXT_ENCODERS else (canonical,)
    return {
        _PEFT_START + name(part, key): value for name in names for key, value in tensors.items()
    }


def _bytes(tensors: Tensors) -> bytes:
    # A single entry of metadata: safetensors writes several in random order. Reshaped, because
    # `ascontiguousarray` turns scalars into arrays of one dimension.
    contiguous = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in tensors.items()}
    return save(contiguous, metadata={"format": "pt"})


def _write(directory: Path, files: dict[str, bytes]) -> None:
    """All files or none, even on a full disk: weights with another's config have a wrong scale."""
    for folder in ("", *(f"{part}/" for part in PARTS)):
        if (directory / folder / PEFT_CONFIG).exists() and folder + PEFT_CONFIG not in files:
            raise ConfigError(
                f"{directory / folder} holds an adapter that would be read with the new one: "
                "choose another directory"
            )
    partial = directory / f".adapter.{secrets.token_hex(4)}.tmp"
    try:
        for name, data in files.items():
            atomic_write_bytes(partial / name, data)
        for name in files:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, directory / name)
    except OSError as error:
        raise write_error(directory, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_adapter(
    path: Path,
    origin: str | None = None,
    layers_per_block: int = 2,
    *,
    pipeline: str | None = None,
) -> PolicySnapshot:
    """Read an adapter, ours or another's: docs/adapters.md lists the forms.

    Layers get the names that transformers uses since 5.6, whatever the file calls them;
    `Adapter.load_weights` maps them to a loaded model's.

    Args:
        path: PEFT's folder, a folder with one of these per part, a LoRA file, or its folder.
        origin: its name in errors; default: `path`.
        layers_per_block: the U-Net's; needed for files with LDM's block names.
        pipeline: diffusers' class, whose converter reads other programs' files of a transformer.

    Raises:
        ConfigError: not a LoRA adapter, a damaged one, or a variant that is not plain LoRA.
    """
    origin = origin or str(path)
    found = find_adapter(path, origin)
    folders = [file.parent for file in found.values() if file.name == PEFT_CONFIG]
    if not folders:
        (file,) = found.values()
        return read_file(file, origin, layers_per_block, pipeline=pipeline)
    parts: dict[str, tuple[Layers, list[str] | None]] = {}
    for folder in folders:
        weights = next(f for f in found.values() if f.parent == folder and f.name != PEFT_CONFIG)
        part, read = _read_part(folder, weights, origin)
        if part in parts:
            raise ConfigError(f"{origin} holds two adapters of the {part}")
        parts[part] = read
    return assemble(parts)


def _read_part(
    folder: Path, weights: Path, origin: str
) -> tuple[str, tuple[Layers, list[str] | None]]:
    try:
        config = from_json((folder / PEFT_CONFIG).read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"{PEFT_CONFIG} is not a JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{origin} holds a damaged adapter: {error}") from error
    scale = read_scale(config, origin)
    state, _ = load_tensors(weights, origin)
    check_plain(state, origin)
    tensors = {key.removeprefix(_PEFT_START): value for key, value in arrays(state).items()}
    if not tensors:
        raise ConfigError(f"{origin} holds no tensors")
    part = folder.name if folder.name in PARTS else _guess_part(config, tensors)
    layers = {
        name: Layer(pair[A], pair[B], scale.alpha_of(name, pair[A].shape[0]))
        for name, pair in pair_layers(part, tensors, origin).items()
    }
    return part, (layers, target_names(config))


def _guess_part(config: dict[str, object], tensors: Tensors) -> str:
    blocks = ("down_blocks.", "mid_block.", "up_blocks.")
    if any(key.startswith(blocks) for key in tensors):
        return UNET
    marks = ("transformer_blocks.", ".attention.to_")
    if any(key.startswith(_TRANSFORMER) or any(m in key for m in marks) for key in tensors):
        return TRANSFORMER
    mapping = config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    projected = named == _PROJECTED or any(key.startswith("text_projection") for key in tensors)
    return TEXT_ENCODERS[1] if projected else TEXT_ENCODERS[0]
