"""What passes between the text encoders, the U-Net and whoever drives them. No networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net is told: hidden [B, L, D]; pooled [B, P] and time_ids [B, 6] for SDXL."""

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
    """Conditioning of P distinct prompts, as the U-Net's layers look at it.

    keys_values: of each cross-attention layer in turn, [P, L, C] each; the rest as in
    `Conditioning`.
    """

    keys_values: tuple[Tensor, ...]
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [*self.keys_values, *(t for t in (self.pooled, self.time_ids) if t is not None)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Prepared:
        """The same with `function` applied to every tensor there is."""
        rest = (None if t is None else function(t) for t in (self.pooled, self.time_ids))
        return Prepared(tuple(map(function, self.keys_values)), *rest)


@dataclass(frozen=True)
class Tokens:
    """ids: one int64 [B, L] per text encoder; truncated: bool [B], text beyond the limit."""

    ids: tuple[Tensor, ...]
    truncated: list[bool]


@dataclass(frozen=True)
class Drawing:
    """How stock pipelines are asked to draw: their arguments of the same names.

    height, width: pixels; None: the model's own. clip_skip: layers of the text encoder that are
    left out. negative_prompt: what guidance leads away from; None: the empty prompt.
    """

    height: int | None = None
    width: int | None = None
    clip_skip: int | None = None
    negative_prompt: str | None = None


PLAIN = Drawing()  # as the model draws by itself
