"""Which adapters are trained, and at which learning rates."""

from __future__ import annotations

import numpy as np
from torch import nn

from texforce_ray.artifacts.snapshot import DENOISERS, TEXT_ENCODERS, LoraShape
from texforce_ray.config import AdapterConfig, Config
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.lora_layers import PREFIX


def adapter_shapes(config: Config, backbone: Backbone) -> dict[str, LoraShape]:
    """Adapter shapes of the trained parts that the model has."""
    parts, trained = backbone.parts(), _trained(config, backbone)
    first, second, *_ = TEXT_ENCODERS
    if config.lora.text_encoder_2 == "same" and second in trained:
        if second not in parts:
            del trained[second]
        elif (kinds := [backbone.family.encoders[name] for name in (first, second)])[1][:4] != (
            kinds[0][:4]
        ):
            raise ConfigError(
                f"lora.text_encoder_2: 'same', but text_encoder is a {kinds[0]} and text_encoder_2 "
                f"a {kinds[1]}, with other layers; give it an adapter of its own, such as "
                "{target_modules: [q, k, v, o]}, or null"
            )
    if missing := [part for part in trained if part not in parts]:
        raise ConfigError(
            f"lora: the base model has no {missing[0]}; it has {', '.join(parts)}; leave the "
            "adapter of that part out"
        )
    for part, adapter in trained.items():
        _check_targets(part, adapter, parts[part])
    return {
        part: LoraShape(adapter.rank, adapter.alpha, adapter.target_modules)
        for part, adapter in trained.items()
    }


def _check_targets(part: str, adapter: AdapterConfig, module: nn.Module) -> None:
    """Check that each name is a layer's: PEFT is content if some of them are."""
    names = [name for name, _ in module.named_modules()]
    for target in adapter.target_modules:
        if not any(f".{name}".endswith(f".{target.removeprefix(PREFIX)}") for name in names):
            key = f"lora.{'denoiser' if part in DENOISERS else part}"
            last = sorted({n.rpartition(".")[2] for n, m in module.named_modules()
                           if isinstance(m, nn.Linear)})  # fmt: skip
            raise ConfigError(
                f"{key}.target_modules: {target!r} matches no layer of the {part}, whose linear "
                f"layers are {last}"
            )


def _trained(config: Config, backbone: Backbone) -> dict[str, AdapterConfig]:
    """The configured adapters, by the pipeline's part names."""
    lora = config.lora
    names = (*TEXT_ENCODERS, backbone.family.denoiser)
    parts = zip(names, (lora.text_encoder, lora.second, lora.third, lora.denoiser), strict=True)
    return {part: adapter for part, adapter in parts if adapter is not None}


def peak_rate(config: Config, backbone: Backbone, part: str) -> float:
    """A part's peak learning rate."""
    return _trained(config, backbone)[part].lr or config.optimizer.lr


def learning_rate_factor(update: int, total: int, warmup_fraction: float, schedule: str) -> float:
    """Linear warm-up over `warmup_fraction` of the updates, then cosine decay to 0 or constant."""
    warmup = round(total * warmup_fraction)
    if update < warmup:
        return (update + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (update - warmup) / max(1, total - warmup)
    return 0.5 * (1 + float(np.cos(np.pi * min(1.0, progress))))
