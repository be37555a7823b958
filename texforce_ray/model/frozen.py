"""Third-party denoisers and their LoRAs, used unchanged while the text encoder is tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from texforce_ray.artifacts.families import Family
from texforce_ray.artifacts.inspection import check_unet
from texforce_ray.artifacts.location import (
    DIFFUSERS_FILE,
    DIFFUSERS_PICKLE,
    PEFT_CONFIG,
    PEFT_PICKLE,
    PEFT_WEIGHTS,
    most_layers,
)
from texforce_ray.artifacts.snapshot import TRANSFORMER, UNET
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter_files import read_adapter
from texforce_ray.model.fusion import merge, update_of
from texforce_ray.model.loading import complete

_NAMES = {UNET: "U-Net", TRANSFORMER: "transformer"}
# What must be equal for a denoiser to stand in for another one.
_FITTING = (
    "in_channels", "out_channels", "cross_attention_dim", "sample_size", "joint_attention_dim",
    "pooled_projection_dim", "guidance_embeds", "patch_size", "cap_feat_dim",
)  # fmt: skip


def load_denoiser(path: str, dtype: torch.dtype, replaced: Any, family: Family) -> nn.Module:
    """A whole denoiser from a directory (of its own, or of a pipeline with one) or hub id.

    Raises:
        ConfigError: not a denoiser of this family, or one that does not fit the pipeline.
    """
    folder, where = Path(path).expanduser(), f"model.denoiser: {path}"
    inside = (folder / family.denoiser / "config.json").is_file()
    try:
        denoiser, loaded = getattr(diffusers, family.denoiser_class).from_pretrained(
            str(folder) if folder.exists() else path,
            subfolder=family.denoiser if inside else None,
            dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"model.denoiser: cannot load {path!r}: {error}") from error
    config = dict(denoiser.config)
    if family.denoiser == UNET:
        xl = replaced.config["addition_embed_type"] == "text_time"
        check_unet(config, where, xl=xl)
    complete(denoiser, loaded, where)
    for key in _FITTING:
        if config.get(key) != (wanted := replaced.config.get(key)):
            raise ConfigError(f"{where} has {key} {config.get(key)}, the pipeline's has {wanted}")
    return denoiser


def merge_adapter(pipe: Any, path: str, family: Family) -> None:
    """Merge the denoiser's part of an adapter into the pipeline's denoiser.

    `path`: any form that `read_adapter` knows, or a hub id.

    Raises:
        ConfigError: missing, damaged, not plain LoRA, or for another denoiser.
    """
    key, part = "model.denoiser_adapters", family.denoiser
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.startswith((".", "/", "~")):
            raise ConfigError(f"{key}: {path} does not exist")
        folder = _download(path, part)
    denoiser = getattr(pipe, part)
    snapshot = read_adapter(
        folder, f"{key}: {path}", most_layers(denoiser.config), pipeline=family.pipeline
    )
    if part not in snapshot.adapters:
        raise ConfigError(
            f"{key}: {path} is an adapter of the {' and the '.join(snapshot.adapters)}, not of "
            f"the {_NAMES[part]}"
        )
    if not any(update.any() for update in update_of(snapshot, part).values()):
        raise ConfigError(
            f"{key}: {path} changes nothing in the {_NAMES[part]}: all its updates are 0"
        )
    merge(snapshot, part, denoiser, f"{key}: {path}", "this pipeline")


def _download(repository: str, part: str) -> Path:
    """The cached adapter file or folder of a hub repository, downloaded if needed.

    Raises:
        ConfigError: there is no such repository, no adapter in it, or no network.
    """
    origin = f"model.denoiser_adapters: {repository}"
    sets = (
        (PEFT_CONFIG, PEFT_WEIGHTS), (PEFT_CONFIG, PEFT_PICKLE),
        (f"{part}/{PEFT_CONFIG}", f"{part}/{PEFT_WEIGHTS}"),
        (f"{part}/{PEFT_CONFIG}", f"{part}/{PEFT_PICKLE}"), (DIFFUSERS_FILE,), (DIFFUSERS_PICKLE,),
    )  # fmt: skip
    try:
        for names in sets:
            try:
                files = [Path(hf_hub_download(repository, name)) for name in names]
            except EntryNotFoundError:
                continue
            return files[0] if len(names) == 1 else files[0].parent
        named = [name for name in list_repo_files(repository) if name.endswith(".safetensors")]
        if len(named) == 1:
            return Path(hf_hub_download(repository, named[0]))
    except (OSError, ValueError, EntryNotFoundError) as error:  # what the hub's client raises
        words = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(
            f"{origin} is not a path and cannot be downloaded from the hub: {words}"
        ) from error
    raise ConfigError(f"{origin} holds {len(named)} LoRA files; download one and give its path")
