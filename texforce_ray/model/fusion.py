"""Sums of adapters without training: sum_i w_i theta_i (TexForce, section 3.3).

Theta is the update alpha / r * B A, never A and B themselves: averaging those separately would mix
the products of one task with those of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from texforce_ray.artifacts.snapshot import LoraShape, PolicySnapshot, Tensors
from texforce_ray.errors import ConfigError
from texforce_ray.model.lora_layers import (
    A,
    B,
    Layer,
    canonical,
    filled,
    format_names,
    linear_shape,
    own_names,
)

Weighted = tuple[float, PolicySnapshot]


@dataclass(frozen=True)
class _Module:
    """One layer's update as B A with scale 1: a [r, in], b [out, r]; for convolutions
    [r, in, k, k] and [out, r, 1, 1]."""

    a: np.ndarray
    b: np.ndarray


def fuse(adapters: Sequence[Weighted]) -> PolicySnapshot:
    """The exact weighted sum: ranks add up; parts and layers that only one adapter has are kept.

    Raises:
        ConfigError: a layer has different sizes in two adapters.
    """
    shapes: dict[str, LoraShape] = {}
    fused: dict[str, Tensors] = {}
    for part in dict.fromkeys(part for _, adapter in adapters for part in adapter.adapters):
        modules: dict[str, list[_Module]] = {}
        for weight, adapter in adapters:
            for name, module in _modules(adapter, part, weight).items():
                before = modules.setdefault(name, [])
                if before and _sizes(before[0]) != _sizes(module):
                    raise ConfigError(
                        f"layer {part}.{name} is {_sizes(before[0])} in one adapter and "
                        f"{_sizes(module)} in another: they belong to different base models"
                    )
                before.append(module)
        joined = {name: _join(found) for name, found in modules.items()}
        rank = max(module.a.shape[0] for module in joined.values())
        shapes[part] = LoraShape(rank, float(rank), tuple(sorted(joined)))
        fused[part] = _tensors(joined, rank)
    return PolicySnapshot(0, shapes, fused)


def _join(modules: Sequence[_Module]) -> _Module:
    """The sum of modules, some of which may write a 1 x 1 convolution as a linear layer."""
    dimensions = max(module.a.ndim for module in modules)
    ones = [(1,) * (dimensions - module.a.ndim) for module in modules]
    pairs = list(zip(modules, ones, strict=True))
    return _Module(
        np.concatenate([m.a.reshape(*m.a.shape, *one) for m, one in pairs]),
        np.concatenate([m.b.reshape(*m.b.shape, *one) for m, one in pairs], axis=1),
    )


def compress(adapter: PolicySnapshot, rank: int) -> tuple[PolicySnapshot, float]:
    """The best approximation of rank `rank` in every layer, by SVD, and its relative error.

    The error is the Frobenius norm of what is lost over that of the whole update.
    """
    shapes: dict[str, LoraShape] = {}
    compressed: dict[str, Tensors] = {}
    lost = whole = 0.0
    for part in adapter.adapters:
        modules = {}
        for name, module in _modules(adapter, part, 1.0).items():
            # Through QR of the thin factors: the full matrix is never decomposed.
            flat_b, flat_a = (_flat(factor).astype(np.float64) for factor in (module.b, module.a))
            q_b, r_b = np.linalg.qr(flat_b)
            q_a, r_a = np.linalg.qr(flat_a.T)
            u, s, vt = np.linalg.svd(r_b @ r_a.T)
            kept = min(rank, len(s))
            root = np.sqrt(s[:kept])
            new_a, new_b = (root[:, None] * vt[:kept]) @ q_a.T, q_b @ u[:, :kept] * root
            modules[name] = _Module(
                new_a.reshape(kept, *module.a.shape[1:]),
                new_b.reshape(len(new_b), kept, *module.b.shape[2:]),
            )
            lost += float((s[kept:] ** 2).sum())
            whole += float((s**2).sum())
        shapes[part] = LoraShape(rank, float(rank), tuple(sorted(modules)))
        compressed[part] = _tensors(modules, rank)
    error = float(np.sqrt(lost / whole)) if whole else 0.0
    return PolicySnapshot(adapter.version, shapes, compressed), error


def update_of(adapter: PolicySnapshot, part: str) -> dict[str, np.ndarray]:
    """The full update of every layer, float32 [out, in] or [out, in, k, k], by the layer's name."""
    return {
        name: (_flat(m.b) @ _flat(m.a)).reshape(len(m.b), *m.a.shape[1:])
        for name, m in _modules(adapter, part, 1.0).items()
    }


@torch.no_grad()
def merge(adapter: PolicySnapshot, part: str, module: nn.Module, origin: str, model: str) -> None:
    """Add the updates of a part to the weights of its module.

    Raises:
        ConfigError: the module lacks a layer or has it in another size; nothing is changed
            then. `origin` and `model` name the two in the message.
    """
    updates = update_of(adapter, part)
    names = own_names(updates, (name for name, _ in module.named_modules()))
    weights: dict[str, torch.Tensor] = {}
    for name, update in updates.items():
        try:
            weights[name] = module.get_submodule(names[name]).get_parameter("weight")
        except AttributeError:
            continue
        if linear_shape(weights[name].shape) != linear_shape(update.shape):
            raise ConfigError(
                f"{origin} is an adapter of another model: layer {part}.{name} is "
                f"{tuple(weights[name].shape)} in {model} and {update.shape} in the adapter"
            )
    if missing := updates.keys() - weights.keys():
        raise ConfigError(
            f"{origin} is an adapter of another model: the {part} of {model} has no layer "
            f"{format_names(missing)}"
        )
    for name, weight in weights.items():
        added = torch.from_numpy(updates[name]).reshape(weight.shape).to(weight.device)
        weight.copy_(weight.float() + added)


def _modules(adapter: PolicySnapshot, part: str, weight: float) -> dict[str, _Module]:
    tensors = adapter.adapters.get(part, {})
    if not tensors:
        return {}
    shape = adapter.shapes[part]
    scale = np.float32(weight * shape.alpha / shape.rank)
    names = sorted({key.partition(".lora_")[0] for key in tensors})
    return {
        canonical(part, name): _Module(tensors[name + A], scale * tensors[name + B])
        for name in names
    }


def _sizes(module: _Module) -> tuple[int, ...]:
    return module.b.shape[0], *linear_shape(module.a.shape[1:])


def _flat(factor: np.ndarray) -> np.ndarray:
    """[r, in, k, k] as [r, in k k], [out, r, 1, 1] as [out, r]."""
    return factor.reshape(len(factor), -1)


def _tensors(modules: dict[str, _Module], rank: int) -> Tensors:
    """Padded with zero rows to one rank for all layers: PEFT's plain form, and still exact."""
    tensors: Tensors = {}
    for name, module in modules.items():
        whole = filled(Layer(module.a, module.b, float(len(module.a))), rank)
        tensors |= {name + A: whole.a, name + B: whole.b}
    return tensors
