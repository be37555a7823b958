"""Loads pipelines part by part, so that no part silently keeps random weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from texforce_ray.artifacts.families import Family, family_in, tokenizer_of
from texforce_ray.artifacts.inspection import check_pipeline, read_json
from texforce_ray.errors import ConfigError

# Looked up by name: no other class that a model_index.json names is imported.
_CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel, AutoencoderKL,
        AutoencoderTiny,
    )
}  # fmt: skip
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_LEFT_OUT = {"feature_extractor": None, "image_encoder": None}
# Formerly stored as buffers; computed now.
_COMPUTED = ("position_ids",)


def load_pipeline(
    location: str,
    path: str,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
    own: Family | None = None,
    left_out: Sequence[str] = (),
) -> tuple[Any, Family]:
    """Load a pipeline, all of whose weights come from its files.

    Args:
        location: a directory, hub id or single file, as returned by `locate_model`.
        path: its name in errors.
        dtype: of its weights.
        revision: of a hub id.
        variant: of the weight files.
        single_file_config: directory with configs and tokenizers for a single file.
        own: the user's own family, if any.
        left_out: optional text encoders that are not loaded.

    Returns:
        The pipeline, and its family without the encoders that it lacks.

    Raises:
        ConfigError: unavailable, not understood, or incomplete.
    """
    if single_file_config is not None:
        config = Path(single_file_config).expanduser()
        return _from_single_file(location, path, config, dtype, own, left_out)
    folder = Path(location)
    if not folder.is_dir():
        folder = _downloaded(location, revision, variant, left_out)
        check_pipeline(folder, path, variant, own=own, left_out=left_out)
    index = read_json(folder / "model_index.json", path)
    family = family_in(index, path, own, left_out)
    try:
        parts = {
            name: load_part(
                folder / name, _class_of(name, index[name], path, family), dtype, path, variant
            )
            for name in family.models
        }
        kind = getattr(diffusers, family.pipeline)
        given = {**_left_out(kind), **parts, **family.load}
        return kind.from_pretrained(folder, dtype=dtype, **given), family
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(f"model.path: cannot load {path!r}: {error}") from error


def load_part(
    folder: Path, kind: Any, dtype: torch.dtype, path: str, variant: str | None = None
) -> Any:
    """Load one model of a pipeline; without files of the variant, from its plain ones.

    Raises:
        ConfigError: its files lack weights that its config requires.
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
        where: start of the error message.

    Raises:
        ConfigError: some weights would be random; names them.
    """
    missing = [key for key in loaded["missing_keys"] if not key.endswith(_COMPUTED)]
    mismatched = [str(key[0]) for key in loaded.get("mismatched_keys", ())]
    if not (missing or mismatched):
        return model
    others = sorted(loaded.get("unexpected_keys", ()))
    lost = sorted([*missing, *mismatched])
    raise ConfigError(
        f"{where} would get random weights: {len(lost)} of those that its config requires are "
        f"missing or have another size ({', '.join(lost[:3])}, ...)"
        + (f"; its file has others instead ({', '.join(others[:3])}, ...)" if others else "")
        + "; was it saved with another prefix, or by another version of its library?"
    )


def _class_of(part: str, entry: list[str], path: str, family: Family) -> Any:
    """The class of a part by its entry [library, name] in model_index.json."""
    library, name = entry
    if name in family.classes and name not in _CLASSES and library in _LIBRARIES:
        return getattr(_LIBRARIES[library], name)
    if name not in _CLASSES:
        raise ConfigError(
            f"model.path: {path}: {part} is a {name} in model_index.json; supported: "
            f"{', '.join(_CLASSES)}"
        )
    return _CLASSES[name]


def _left_out(pipeline: Any) -> dict[str, None]:
    """The pipeline's parts that a prompt alone does not need."""
    return {k: v for k, v in _LEFT_OUT.items() if k in signature(pipeline.__init__).parameters}


def _downloaded(
    identifier: str, revision: str | None, variant: str | None, left_out: Sequence[str]
) -> Path:
    """The cached folder of a hub id, downloaded if needed.

    Raises:
        ConfigError: it cannot be downloaded.
    """
    encoders = {part: None for name in left_out for part in (name, tokenizer_of(name))}
    nothing = {"safety_checker": None, **_LEFT_OUT, **encoders}
    try:
        folder = DiffusionPipeline.download(
            identifier, revision=revision, variant=variant, **nothing
        )
    except Exception as error:  # the hub's client raises many kinds
        lines = [line for line in str(error).splitlines() if line.strip()]
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        raise ConfigError(
            f"model.path: {identifier!r} is not a local folder and cannot be downloaded from the "
            f"Hugging Face hub{' (HF_HUB_OFFLINE is set)' if offline else ''}: is the machine "
            f"offline, the id or model.revision wrong, or the model gated? Its client reports: "
            f"{lines[0] if lines else type(error).__name__}"
        ) from None
    return Path(folder)


def _from_single_file(
    file: str,
    path: str,
    config: Path,
    dtype: torch.dtype,
    own: Family | None,
    left_out: Sequence[str],
) -> tuple[Any, Family]:
    """Load another program's checkpoint with the configs and tokenizers of a local directory."""
    index = read_json(config / "model_index.json", str(config))
    family = family_in(index, str(config), own, left_out)
    try:
        kind = getattr(diffusers, family.pipeline)
        options = {"local_files_only": True, **_left_out(kind), **family.load}
        pipe = kind.from_single_file(file, config=str(config), dtype=dtype, **options)
    except Exception as error:  # diffusers' converters raise anything on files of other models
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"model.path: {path} cannot be read with the configs of {config} "
            f"(model.single_file_config): {lines[0] if lines else type(error).__name__}"
        ) from error
    for name in family.models:
        unset = [n for n, p in getattr(pipe, name).named_parameters() if p.is_meta]
        if unset:
            raise ConfigError(
                f"model.path: {path} lacks weights of {name} that {config} "
                f"(model.single_file_config) requires: {', '.join(unset[:3])}, ..."
            )
    return pipe, family
