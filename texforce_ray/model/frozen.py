"""Third-party U-Nets and U-Net LoRAs, used unchanged while the text encoder is tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from texforce_ray.artifacts.inspection import check_unet
from texforce_ray.artifacts.location import (
    DIFFUSERS_FILE,
    DIFFUSERS_PICKLE,
    PEFT_CONFIG,
    PEFT_PICKLE,
    PEFT_WEIGHTS,
    most_layers,
)
from texforce_ray.artifacts.snapshot import UNET
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter_files import read_adapter
from texforce_ray.model.fusion import merge, update_of
from texforce_ray.model.loading import complete


def load_unet(path: str, dtype: torch.dtype, replaced: UNet2DConditionModel) -> nn.Module:
    """A whole U-Net from a directory (of the U-Net, or of a pipeline with one) or hub id.

    Raises:
        ConfigError: not a U-Net, or one that does not fit the pipeline.
    """
    folder = Path(path).expanduser()
    inside = (folder / "unet" / "config.json").is_file()
    try:
        unet, loaded = UNet2DConditionModel.from_pretrained(
            str(folder) if folder.exists() else path,
            subfolder="unet" if inside else None,
            dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"model.unet: cannot load {path!r}: {error}") from error
    xl = replaced.config["addition_embed_type"] == "text_time"
    check_unet(dict(unet.config), f"model.unet: {path}", xl=xl)
    complete(unet, loaded, f"model.unet: {path}")
    for key in ("in_channels", "out_channels", "cross_attention_dim", "sample_size"):
        if unet.config[key] != replaced.config[key]:
            raise ConfigError(
                f"model.unet: {path} has {key} {unet.config[key]}, the pipeline's U-Net has "
                f"{replaced.config[key]}"
            )
    return unet


def merge_unet_adapter(pipe: Any, path: str) -> None:
    """Merge the U-Net part of an adapter into the pipeline's U-Net.

    `path`: any form that `read_adapter` knows, or a hub id.

    Raises:
        ConfigError: missing, damaged, not plain LoRA, or for another U-Net.
    """
    key = "model.unet_adapters"
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.startswith((".", "/", "~")):
            raise ConfigError(f"{key}: {path} does not exist")
        folder = _download(path)
    snapshot = read_adapter(folder, f"{key}: {path}", most_layers(pipe.unet.config))
    if UNET not in snapshot.adapters:
        raise ConfigError(
            f"{key}: {path} is an adapter of the {' and the '.join(snapshot.adapters)}, not of "
            "the U-Net"
        )
    if not any(update.any() for update in update_of(snapshot, UNET).values()):
        raise ConfigError(f"{key}: {path} changes nothing in the U-Net: all its updates are 0")
    merge(snapshot, UNET, pipe.unet, f"{key}: {path}", "this pipeline")


def _download(repository: str) -> Path:
    """The cached adapter file or folder of a hub repository, downloaded if needed.

    Raises:
        ConfigError: there is no such repository, no adapter in it, or no network.
    """
    origin = f"model.unet_adapters: {repository}"
    sets = (
        (PEFT_CONFIG, PEFT_WEIGHTS), (PEFT_CONFIG, PEFT_PICKLE),
        (f"{UNET}/{PEFT_CONFIG}", f"{UNET}/{PEFT_WEIGHTS}"),
        (f"{UNET}/{PEFT_CONFIG}", f"{UNET}/{PEFT_PICKLE}"), (DIFFUSERS_FILE,), (DIFFUSERS_PICKLE,),
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
