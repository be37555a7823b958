"""Sums of adapters without training: sum_i w_i theta_i (TexForce, section 3.3).

Theta is the update alpha / r * B A, never A and B themselves: averaging those separately would mix
the products of one task with those of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from texforce_ray.errors import ConfigError
from texforce_ray.model.snapshot import LoraShape, PolicySnapshot, Tensors

Weighted = tuple[float, PolicySnapshot]


@dataclass(frozen=True)
class _Module:
    """One layer's update as B A with scale 1: a [r, in], b [out, r]."""

    a: np.ndarray
    b: np.ndarray


def fuse(adapters: Sequence[Weighted]) -> PolicySnapshot:
    """The exact weighted sum: ranks add, parts and layers that only one has are kept.

    Raises:
        ConfigError: two adapters have a layer of different sizes.
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
        joined = {
            name: _Module(
                np.concatenate([m.a for m in found]), np.concatenate([m.b for m in found], axis=1)
            )
            for name, found in modules.items()
        }
        rank = max(module.a.shape[0] for module in joined.values())
        shapes[part] = LoraShape(rank, float(rank), tuple(sorted(joined)))
        fused[part] = _tensors(joined, rank)
    return PolicySnapshot(0, shapes, fused)


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
            q_b, r_b = np.linalg.qr(module.b.astype(np.float64))
            q_a, r_a = np.linalg.qr(module.a.T.astype(np.float64))
            u, s, vt = np.linalg.svd(r_b @ r_a.T)
            kept = min(rank, len(s))
            root = np.sqrt(s[:kept])
            modules[name] = _Module((root[:, None] * vt[:kept]) @ q_a.T, q_b @ u[:, :kept] * root)
            lost += float((s[kept:] ** 2).sum())
            whole += float((s**2).sum())
        shapes[part] = LoraShape(rank, float(rank), tuple(sorted(modules)))
        compressed[part] = _tensors(modules, rank)
    error = float(np.sqrt(lost / whole)) if whole else 0.0
    return PolicySnapshot(adapter.version, shapes, compressed), error


def update_of(adapter: PolicySnapshot, part: str) -> dict[str, np.ndarray]:
    """The full update of every layer, float32 [out, in], by the layer's name."""
    return {name: m.b @ m.a for name, m in _modules(adapter, part, 1.0).items()}


def _modules(adapter: PolicySnapshot, part: str, weight: float) -> dict[str, _Module]:
    tensors = adapter.adapters.get(part, {})
    if not tensors:
        return {}
    shape = adapter.shapes[part]
    if unfit := [key for key, value in tensors.items() if value.ndim != 2]:
        raise ConfigError(f"{part}.{unfit[0]} is no linear layer's; those alone can be fused")
    scale = np.float32(weight * shape.alpha / shape.rank)
    names = sorted({key.partition(".lora_")[0] for key in tensors})
    return {
        name: _Module(tensors[f"{name}.lora_A.weight"], scale * tensors[f"{name}.lora_B.weight"])
        for name in names
    }


def _sizes(module: _Module) -> tuple[int, int]:
    return module.b.shape[0], module.a.shape[1]


def _tensors(modules: dict[str, _Module], rank: int) -> Tensors:
    """Zero rows fill up to one rank for all layers: PEFT's plain form, and still exact."""
    tensors: Tensors = {}
    for name, module in modules.items():
        missing = rank - module.a.shape[0]
        a = np.pad(module.a, ((0, missing), (0, 0)))
        b = np.pad(module.b, ((0, 0), (0, missing)))
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a, dtype=np.float32)
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b, dtype=np.float32)
    return tensors
