"""LoRA layers by canonical name, of any ranks and scales, combined into a snapshot.

CLIPTextModel's layers were `text_model.encoder...` up to transformers 5.5 and are `encoder...`
since; CLIPTextModelWithProjection kept the prefix. Snapshots read from files have the newer names
(`canonical`), files have both or the older one, and `own_names` maps to those of a loaded module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from texforce_ray.artifacts.snapshot import TEXT_ENCODERS, LoraShape, PolicySnapshot, Tensors
from texforce_ray.errors import ConfigError

PREFIX = "text_model."
A, B = ".lora_A.weight", ".lora_B.weight"
PROJECTED = TEXT_ENCODERS[1]  # CLIPTextModelWithProjection
_OF_CLIP = ("encoder.layers.", "embeddings.", "final_layer_norm", "text_projection")
_SHOWN = 4


@dataclass(frozen=True)
class Layer:
    """One layer's update alpha / r * B A.

    a: [r, in], or [r, in, k, k] for a convolution; b: [out, r], or [out, r, 1, 1].
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


Layers = dict[str, Layer]


def of_clip(part: str, name: str) -> bool:
    """Whether a layer or tensor is that of a CLIP text encoder, by its name."""
    if part not in TEXT_ENCODERS:
        return False
    return name.removeprefix(PREFIX).startswith(_OF_CLIP)


def canonical(part: str, name: str) -> str:
    """A layer's or tensor's name in transformers since 5.6."""
    if not of_clip(part, name):
        return name
    bare = name.removeprefix(PREFIX)
    return bare if part != PROJECTED or bare.startswith("text_projection") else PREFIX + bare


def prefixed(part: str, name: str) -> str:
    """A layer's or tensor's name in files and in transformers before 5.6."""
    if not of_clip(part, name):
        return name
    bare = name.removeprefix(PREFIX)
    return bare if bare.startswith("text_projection") else PREFIX + bare


def own_names(names: Iterable[str], module: Iterable[str]) -> dict[str, str]:
    """Map each name to the module's own, whatever layout either has; unknown ones stay as is."""
    own = set(module)
    mapped = {}
    for name in names:
        forms = (name, name.removeprefix(PREFIX), PREFIX + name)
        mapped[name] = next((form for form in forms if form in own), name)
    return mapped


def format_names(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    found = sorted(names)
    more = len(found) - _SHOWN
    return ", ".join(found[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def pair_layers(part: str, tensors: Mapping[str, np.ndarray], origin: str) -> dict[str, Tensors]:
    """Tensors by PEFT's key, paired up: {layer: {A: ..., B: ...}} by canonical name.

    Raises:
        ConfigError: a tensor is neither an A nor a B, or lacks its partner or does not fit it.
    """
    pairs: dict[str, Tensors] = {}
    for key, value in tensors.items():
        end = next((end for end in (A, B) if key.endswith(end)), None)
        if end is None:
            raise ConfigError(
                f"{origin}: tensor {key} is not understood; LoRA tensors end with {A} or {B}"
            )
        pair = pairs.setdefault(canonical(part, key.removesuffix(end)), {})
        if end in pair and not np.array_equal(pair[end], value):
            raise ConfigError(f"{origin}: tensor {key} differs with and without {PREFIX}")
        pair[end] = value
    for name, pair in pairs.items():
        _check_pair(name, pair, origin)
    return pairs


def _check_pair(name: str, pair: Tensors, origin: str) -> None:
    if missing := [end for end in (A, B) if end not in pair]:
        raise ConfigError(f"{origin} holds a damaged adapter: {name}{missing[0]} is missing")
    a, b = pair[A], pair[B]
    fit = a.ndim == b.ndim and a.ndim in (2, 4) and a.shape[0] == b.shape[1] > 0
    if not fit or (b.ndim == 4 and b.shape[2:] != (1, 1)):
        raise ConfigError(
            f"{origin} holds a damaged adapter: {name} has A {a.shape} and B {b.shape}; they "
            "should be [r, in] and [out, r]"
        )


def assemble(parts: Mapping[str, tuple[Layers, Iterable[str] | None]]) -> PolicySnapshot:
    """A snapshot of layers by part; with target modules, or None for the layers' full names.

    Layers that share one rank and alpha keep their bits. Otherwise all are padded with zeros to the
    highest rank and B absorbs their scale, which gives the same update.
    """
    shapes: dict[str, LoraShape] = {}
    adapters: dict[str, Tensors] = {}
    for part, (layers, targets) in parts.items():
        kinds = {(layer.rank, layer.alpha) for layer in layers.values()}
        rank = max(layer.rank for layer in layers.values())
        alpha, plain = float(rank), layers
        if len(kinds) == 1:
            ((rank, alpha),) = kinds
        else:
            plain = {name: filled(layer, rank) for name, layer in layers.items()}
        named = sorted(layers if targets is None else {canonical(part, t) for t in targets})
        shapes[part] = LoraShape(rank, alpha, tuple(named))
        adapters[part] = {}
        for name, layer in plain.items():
            adapters[part] |= {name + A: layer.a, name + B: layer.b}
    return PolicySnapshot(0, shapes, adapters)


def filled(layer: Layer, rank: int) -> Layer:
    """The same update with scale 1, padded to a rank that is not lower than its own."""
    extra = (0, rank - layer.rank)
    rest = [(0, 0)] * (layer.a.ndim - 2)
    a = np.pad(layer.a, [extra, (0, 0), *rest])
    b = np.pad(layer.b * np.float32(layer.alpha / layer.rank), [(0, 0), extra, *rest])
    return Layer(
        np.ascontiguousarray(a, dtype=np.float32),
        np.ascontiguousarray(b, dtype=np.float32),
        float(rank),
    )


def rescaled(snapshot: PolicySnapshot, shapes: Mapping[str, LoraShape]) -> PolicySnapshot:
    """The same updates for a policy of these shapes: B absorbs a difference in alpha / r.

    Raises:
        ConfigError: parts or ranks differ; `Adapter.load_weights` compares the layers.
    """
    if snapshot.adapters.keys() != shapes.keys():
        raise ConfigError(
            f"the adapter is on {', '.join(snapshot.adapters)}, the policy on {', '.join(shapes)}"
        )
    adapters: dict[str, Tensors] = {}
    for part, tensors in snapshot.adapters.items():
        old, new = snapshot.shapes[part], shapes[part]
        if old.rank != new.rank:
            raise ConfigError(
                f"the adapter of the {part} has rank {old.rank}, the policy rank {new.rank}"
            )
        factor = np.float32((old.alpha / old.rank) / (new.alpha / new.rank))
        adapters[part] = {
            key: value * factor if key.endswith(B) and factor != 1 else value
            for key, value in tensors.items()
        }
    return PolicySnapshot(snapshot.version, dict(shapes), adapters)


def linear_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A weight's shape; that of a 1 x 1 convolution is the equivalent linear layer's."""
    sizes = tuple(shape)
    return sizes[:-2] if len(sizes) > 2 and sizes[-2:] == (1, 1) else sizes
