"""Which adapters are trained, and at which learning rates."""

from __future__ import annotations

import numpy as np

from texforce_ray.artifacts.snapshot import PARTS, TEXT_ENCODERS, LoraShape
from texforce_ray.config import AdapterConfig, Config
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import Backbone


def adapter_shapes(config: Config, backbone: Backbone) -> dict[str, LoraShape]:
    """Adapter shapes of the trained parts that the model has."""
    parts, trained = backbone.parts(), _trained(config)
    if config.lora.text_encoder_2 == "same" and TEXT_ENCODERS[1] not in parts:
        trained.pop(TEXT_ENCODERS[1], None)
    if missing := [part for part in trained if part not in parts]:
        raise ConfigError(
            f"lora: the base model has no {missing[0]}; it has {', '.join(parts)}; leave the "
            "adapter of that part out"
        )
    return {
        part: LoraShape(adapter.rank, adapter.alpha, adapter.target_modules)
        for part, adapter in trained.items()
    }


def _trained(config: Config) -> dict[str, AdapterConfig]:
    """The configured adapters, by the pipeline's part names."""
    lora = config.lora
    parts = zip(PARTS, (lora.text_encoder, lora.second, lora.denoiser), strict=True)
    return {part: adapter for part, adapter in parts if adapter is not None}


def peak_rate(config: Config, part: str) -> float:
    """A part's peak learning rate."""
    return _trained(config)[part].lr or config.optimizer.lr


def learning_rate_factor(update: int, total: int, warmup_fraction: float, schedule: str) -> float:
    """Linear warm-up over `warmup_fraction` of the updates, then cosine decay to 0 or constant."""
    warmup = round(total * warmup_fraction)
    if update < warmup:
        return (update + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (update - warmup) / max(1, total - warmup)
    return 0.5 * (1 + float(np.cos(np.pi * min(1.0, progress))))
