"""Data passed between the text encoders, the U-Net and their callers. No networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The U-Net's inputs: hidden [B, L, D]; pooled [B, P] and time_ids [B, 6] for SDXL."""

    hidden: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __getitem__(self, index: Tensor) -> Conditioning:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: Any = {k: None if v is None else v[index] for k, v in values.items()}
        return Conditioning(**chosen)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Conditioning)}
        joined: Any = {k: None if c[0] is None else torch.cat(c) for k, c in columns.items()}
        return Conditioning(**joined)


@dataclass(frozen=True)
class Prepared:
    """Conditioning of P distinct prompts, in the form that the U-Net's layers use.

    keys_values: of each cross-attention layer in turn, [P, L, C] each; the rest as in
    `Conditioning`.
    """

    keys_values: tuple[Tensor, ...]
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [*self.keys_values, *(t for t in (self.pooled, self.time_ids) if t is not None)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Prepared:
        """A copy with `function` applied to every tensor."""
        rest = (None if t is None else function(t) for t in (self.pooled, self.time_ids))
        return Prepared(tuple(map(function, self.keys_values)), *rest)


@dataclass(frozen=True)
class Tokens:
    """ids: one int64 [B, L] per text encoder; truncated: bool [B], whether text was cut off."""

    ids: tuple[Tensor, ...]
    truncated: list[bool]


@dataclass(frozen=True)
class Drawing:
    """Drawing options, named as the arguments of stock pipelines.

    height, width: pixels; None: the model's own. clip_skip: layers of the text encoder to skip.
    negative_prompt: the prompt that guidance steers away from; None: the empty prompt.
    """

    height: int | None = None
    width: int | None = None
    clip_skip: int | None = None
    negative_prompt: str | None = None


PLAIN = Drawing()  # the model's own defaults
