"""Loads pipelines part by part, so that no part is left with random weights without a word."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from texforce_ray.errors import ConfigError
from texforce_ray.model.inspection import SUPPORTED, check_pipeline, read_json

_PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")
# By name alone: what else a model_index.json names is not imported.
_CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel, AutoencoderKL,
        AutoencoderTiny,
    )
}  # fmt: skip
_LEFT_OUT = {"feature_extractor": None, "image_encoder": None}
# Stored as buffers once; they are computed now.
_COMPUTED = ("position_ids",)


def load_pipeline(
    location: str,
    path: str,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
) -> Any:
    """A pipeline whose every weight came from its files.

    Args:
        location: a directory, hub id or single file, as `locate_model` gives it.
        path: how errors name it.
        dtype: of its weights.
        revision: of a hub id.
        variant: of the weight files.
        single_file_config: directory with configs and tokenizers for a single file.

    Raises:
        ConfigError: not to be had, not understood, or incomplete.
    """
    if single_file_config is not None:
        return _from_single_file(location, path, Path(single_file_config).expanduser(), dtype)
    folder = Path(location)
    if not folder.is_dir():
        folder = _downloaded(location, revision, variant)
        check_pipeline(folder, path, variant)
    index = read_json(folder / "model_index.json", path)
    kind, extra = pipeline_class(index["_class_name"], path)
    try:
        parts = {
            name: load_part(
                folder / name, _class_of(name, index[name][1], path), dtype, path, variant
            )
            for name in _PARTS
            if name in index
        }
        return kind.from_pretrained(folder, dtype=dtype, **_LEFT_OUT, **parts, **extra)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(f"model.path: cannot load {path!r}: {error}") from error


def pipeline_class(name: str | None, path: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline's class of that name, and its own arguments."""
    if name == "StableDiffusionXLPipeline":
        return StableDiffusionXLPipeline, {"add_watermarker": False}
    if name == "StableDiffusionPipeline":
        return StableDiffusionPipeline, {"safety_checker": None, "requires_safety_checker": False}
    raise ConfigError(f"model.path: {path} holds a {name}; supported is {', '.join(SUPPORTED)}")


def load_part(
    folder: Path, kind: Any, dtype: torch.dtype, path: str, variant: str | None = None
) -> Any:
    """One model of a pipeline; where it has no files of the variant, its plain ones.

    Raises:
        ConfigError: weights that its config asks for are not in its files.
    """
    has = variant is not None and any(folder.glob(f"*.{variant}*"))
    model, loaded = kind.from_pretrained(
        folder, dtype=dtype, variant=variant if has else None, output_loading_info=True
    )
    return complete(model, loaded, f"model.path: {path}: {folder.name}")


def complete(model: Any, loaded: dict[str, Any], where: str) -> Any:
    """The model, if all its weights came from its files.

    Args:
        model: loaded by `from_pretrained` with `output_loading_info`.
        loaded: that information.
        where: begins the error.

    Raises:
        ConfigError: names weights that would be random.
    """
    missing = [key for key in loaded["missing_keys"] if not key.endswith(_COMPUTED)]
    mismatched = [str(key[0]) for key in loaded.get("mismatched_keys", ())]
    if not (missing or mismatched):
        return model
    found = sorted(loaded.get("unexpected_keys", ()))
    lost = sorted([*missing, *mismatched])
    raise ConfigError(
        f"{where} would get random weights: {len(lost)} of those that its config asks for are "
        f"missing or of another size ({', '.join(lost[:3])}, ...)"
        + (f"; its file has others instead ({', '.join(found[:3])}, ...)" if found else "")
        + ". Was it saved with another prefix, or by another version of its library?"
    )


def _class_of(part: str, name: str, path: str) -> Any:
    if name not in _CLASSES:
        raise ConfigError(
            f"model.path: {path}: model_index.json says that {part} is a {name}; supported are "
            f"{', '.join(_CLASSES)}"
        )
    return _CLASSES[name]


def _downloaded(identifier: str, revision: str | None, variant: str | None) -> Path:
    """The cached folder of a hub id.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        folder = StableDiffusionPipeline.download(
            identifier, revision=revision, variant=variant, safety_checker=None, **_LEFT_OUT
        )
    except Exception as error:  # the hub's client raises many kinds
        lines = [line for line in str(error).splitlines() if line.strip()]
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        raise ConfigError(
            f"model.path: {identifier!r} is no local folder, and cannot be had from the Hugging "
            f"Face hub{' (HF_HUB_OFFLINE is set)' if offline else ''}: is the machine offline, the "
            f"id or model.revision wrong, or the model gated? The hub's client says: "
            f"{lines[0] if lines else type(error).__name__}"
        ) from None
    return Path(folder)


def _from_single_file(file: str, path: str, config: Path, dtype: torch.dtype) -> Any:
    """A checkpoint of another program, with the configs and tokenizers of a local directory."""
    index = read_json(config / "model_index.json", str(config))
    kind, extra = pipeline_class(index.get("_class_name"), str(config))
    try:
        pipe = kind.from_single_file(
            file, config=str(config), dtype=dtype, local_files_only=True, **_LEFT_OUT, **extra
        )
    except Exception as error:  # diffusers' converters raise anything on files of other models
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"model.path: {path} cannot be read with the configs of {config} "
            f"(model.single_file_config): {lines[0] if lines else type(error).__name__}"
        ) from error
    for name in _PARTS:
        model = getattr(pipe, name, None)
        unset = [n for n, p in model.named_parameters() if p.is_meta] if model is not None else []
        if unset:
            raise ConfigError(
                f"model.path: {path} lacks weights of {name} that {config} "
                f"(model.single_file_config) asks for: {', '.join(unset[:3])}, ..."
            )
    return pipe
