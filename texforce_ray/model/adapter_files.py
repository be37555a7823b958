"""Adapters as files: directories that stock PEFT and stock diffusers both load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import lora_config
from texforce_ray.model.location import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_WEIGHTS
from texforce_ray.model.snapshot import PARTS, UNET, LoraShape, PolicySnapshot, Tensors
from texforce_ray.records.files import from_json


def export_adapter(snapshot: PolicySnapshot, directory: Path, base: str) -> None:
    """Write one directory that stock PEFT and stock diffusers both load.

    `adapter_config.json` + `adapter_model.safetensors` for `PeftModel.from_pretrained`, in the
    directory itself for one part and in a folder named for each part if there are several;
    `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    layers: dict[str, Any] = {}
    for part, tensors in snapshot.adapters.items():
        folder = directory if len(snapshot.adapters) == 1 else directory / part
        folder.mkdir(exist_ok=True)
        weights = {key: torch.from_numpy(value.copy()) for key, value in tensors.items()}
        config = lora_config(snapshot.shapes[part])
        config.base_model_name_or_path = base
        config.inference_mode = True
        config.save_pretrained(folder)
        save_file(
            {f"base_model.model.{key}": value for key, value in weights.items()},
            folder / PEFT_WEIGHTS,
            metadata={"format": "pt"},
        )
        layers[f"{part}_lora_layers"] = weights
        layers[f"{part}_lora_adapter_metadata"] = lora_config(snapshot.shapes[part]).to_dict()
    kind = (
        StableDiffusionXLPipeline
        if "text_encoder_2" in snapshot.adapters
        else StableDiffusionPipeline
    )
    kind.save_lora_weights(directory, safe_serialization=True, **layers)


def read_adapter(directory: Path, origin: str | None = None) -> PolicySnapshot:
    """Read an adapter, ours or another's: PEFT's folder, one for each part, or diffusers' file.

    Args:
        directory: where it is (the file itself is accepted too).
        origin: how errors name it; default: `directory`.

    Raises:
        ConfigError: not a LoRA adapter, a damaged one, or a variant that is not plain LoRA.
    """
    origin = origin or str(directory)
    if directory.is_file():
        return _read_diffusers(directory, origin)
    folders = [directory, *(directory / part for part in PARTS)]
    found = [folder for folder in folders if (folder / PEFT_CONFIG).is_file()]
    if not found and (directory / DIFFUSERS_FILE).is_file():
        return _read_diffusers(directory / DIFFUSERS_FILE, origin)
    if not found or not all((folder / PEFT_WEIGHTS).is_file() for folder in found):
        raise ConfigError(
            f"{origin} is not an adapter: it should hold {PEFT_CONFIG} and {PEFT_WEIGHTS}, or "
            f"{DIFFUSERS_FILE}"
        )
    parts = dict(_read_part(folder, origin) for folder in found)
    shapes = {part: shape for part, (shape, _) in parts.items()}
    return PolicySnapshot(0, shapes, {part: tensors for part, (_, tensors) in parts.items()})


def _read_part(folder: Path, origin: str) -> tuple[str, tuple[LoraShape, Tensors]]:
    try:
        config, loaded = LoraConfig.from_pretrained(str(folder)), load_file(folder / PEFT_WEIGHTS)
    except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise ConfigError(f"{origin} holds a damaged adapter: {error}") from error
    tensors = {k.removeprefix("base_model.model."): v.float().numpy() for k, v in loaded.items()}
    part = folder.name if folder.name in PARTS else _guess_part(tensors)
    return part, (_shape(config, tensors, origin), tensors)


def _shape(config: LoraConfig, tensors: Mapping[str, np.ndarray], origin: str) -> LoraShape:
    variants = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "use_qalora")
    if found := [name for name in variants if getattr(config, name, None)]:
        raise ConfigError(
            f"{origin} is not a plain LoRA adapter (it sets {', '.join(found)}); plain LoRA of one "
            "rank and alpha is supported"
        )
    named = config.target_modules
    if isinstance(named, str) or not named:  # a regular expression: the tensors say what it meant
        named = {key.partition(".lora_")[0] for key in tensors}
    # rsLoRA scales by alpha / sqrt(r) where LoRA scales by alpha / r.
    alpha = float(config.lora_alpha) * (config.r**0.5 if config.use_rslora else 1.0)
    return LoraShape(config.r, alpha, tuple(sorted(named)))


def _guess_part(tensors: Mapping[str, np.ndarray]) -> str:
    blocks = ("down_blocks.", "mid_block.", "up_blocks.")
    return UNET if any(key.startswith(blocks) for key in tensors) else PARTS[0]


def _read_diffusers(file: Path, origin: str) -> PolicySnapshot:
    """A LoRA file of diffusers whose keys are PEFT's, behind the name of the part."""
    try:
        loaded = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = from_json((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{origin} holds a damaged adapter: {error}") from error
    adapters: dict[str, Tensors] = {}
    shapes: dict[str, LoraShape] = {}
    for part in PARTS:
        prefix = f"{part}."
        tensors = {
            key.removeprefix(prefix): value.float().numpy()
            for key, value in loaded.items()
            if key.startswith(prefix)
        }
        if not tensors:
            continue
        if not all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors):
            raise ConfigError(
                f"{origin} is a LoRA file of an older form; load it with diffusers' "
                "load_lora_weights and save it again, or give it as model.unet_adapters"
            )
        ranks = {value.shape[0] for key, value in tensors.items() if ".lora_A." in key}
        if len(ranks) != 1:
            raise ConfigError(f"{origin} has ranks {sorted(ranks)} in {part}; one is supported")
        rank = ranks.pop()
        alpha = float(metadata.get(f"{part}.lora_alpha", rank))
        targets = tuple(sorted({key.partition(".lora_")[0] for key in tensors}))
        adapters[part], shapes[part] = tensors, LoraShape(rank, alpha, targets)
    if not adapters:
        raise ConfigError(f"{origin} holds no LoRA tensors of {', '.join(PARTS)}")
    return PolicySnapshot(0, shapes, adapters)
