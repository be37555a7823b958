"""Measures an adapter in the process that holds it: a digest of its weights, and their effect.

The most common fault of this kind of system is training that changes nothing: adapters that are
bound to no layer, or never reach the actors that sample. The learner and every rollout actor
measure the same numbers of the same policy version, and the driver compares them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from texforce_ray.artifacts.snapshot import Effect
from texforce_ray.model.adapter import ADAPTER, Adapter
from texforce_ray.model.backbone import Backbone

_PROBE = "a photo"
_TOKENS = 8  # a causal encoder's first embeddings depend on the first tokens alone
_PRIME = 0x9E3779B97F4A7C15 - 2**64  # odd, as int64: every bit of every weight counts


class EffectProbe:
    """Measures adapters on one backbone; the base model's side is computed once."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._ids = tuple(part[:, :_TOKENS] for part in backbone.tokenize([_PROBE]).ids)
        self._base: Tensor | None = None

    @torch.no_grad()
    def measure(self, adapter: Adapter | None) -> Effect:
        """The effect of the attached adapter; without one, that of the base model."""
        embedding = self._embedding()  # first: switching the adapter off and on may bind it
        if adapter is None:
            self._base = embedding
            return Effect(0, 0.0)
        if self._base is None:
            with adapter.disabled():
                self._base = self._embedding()
        name = self.backbone.family.denoiser
        denoiser = _layer_change(adapter.parts[name].module) if name in adapter.parts else 0.0
        return Effect(
            digest(adapter.parameters()),
            float(_relative(embedding, self._base)),
            float(denoiser),
            sum(active_layers(part.module) for part in adapter.parts.values()),
        )

    def _embedding(self) -> Tensor:
        """Of the probe prompt, with the pooled one if there is one: float32 [N]."""
        found = self.backbone.encode(self._ids)
        parts = [t[0].float().reshape(-1) for t in (found.hidden, found.pooled) if t is not None]
        return torch.cat(parts)


def digest(parameters: list[nn.Parameter]) -> int:
    """A checksum of the bits of float32 weights, in order; the same on every device."""
    bits = torch.cat([p.detach().reshape(-1) for p in parameters]).view(torch.int32)
    factors = _factors(len(bits), bits.device)
    # Of bits + 1, so that zeros count too; integers wrap around the same way everywhere.
    return int(((bits + 1) * factors).sum()) % 2**64


@lru_cache(maxsize=4)
def _factors(count: int, device: torch.device) -> Tensor:
    """An odd number for each position."""
    return torch.arange(1, count + 1, device=device) * _PRIME | 1


def active_layers(module: nn.Module) -> int:
    """The number of layers in which an adapter is switched on."""
    layers = (m for m in module.modules() if isinstance(m, BaseTunerLayer))
    return sum(not layer.disable_adapters and ADAPTER in layer.active_adapters for layer in layers)


def _layer_change(module: nn.Module) -> Tensor:
    """How far the first adapted layer's output at a fixed input is from its base's."""
    layer = next(m for m in module.modules() if isinstance(m, BaseTunerLayer))
    base = layer.get_base_layer()
    shape = (1, base.in_channels, 4, 4) if isinstance(base, nn.Conv2d) else (1, base.in_features)
    x = torch.linspace(-1, 1, math.prod(shape), device=base.weight.device).reshape(shape)
    x = x.to(base.weight.dtype)
    return _relative(layer(x), base(x))


def _relative(tuned: Tensor, base: Tensor) -> Tensor:
    base = base.float()
    return (tuned.float() - base).norm() / base.norm().clamp(min=1e-12)
