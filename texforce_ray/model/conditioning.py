"""Data passed between the text encoders, the U-Net and their callers. No networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The denoiser's inputs besides latent and timestep.

    hidden: [B, L, D]. pooled: [B, P], of encoders that have one. time_ids: [B, 6], SDXL's. mask:
    [B, L], 1 for tokens and 0 for padding, where the denoiser reads no padding. guidance: [B], of
    models distilled to read it.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    mask: Tensor | None = None
    guidance: Tensor | None = None

    def __getitem__(self, index: Tensor) -> Conditioning:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: Any = {k: None if v is None else v[index] for k, v in values.items()}
        return Conditioning(**chosen)

    def with_guidance(self, scale: float) -> Conditioning:
        """With guidance as an input of the denoiser."""
        return replace(self, guidance=self.hidden.new_full((len(self.hidden),), scale))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Conditioning)}
        joined: Any = {k: None if c[0] is None else torch.cat(c) for k, c in columns.items()}
        return Conditioning(**joined)


@dataclass(frozen=True)
class Prepared:
    """Conditioning of P distinct prompts, in the form that the denoiser's layers use.

    context: what they read of the tokens, [P, L, C] each: the keys and values of each of a U-Net's
    cross-attention layers in turn, or a transformer's embeddings. The rest as in `Conditioning`.
    """

    context: tuple[Tensor, ...]
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    mask: Tensor | None = None
    guidance: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        rest = (self.pooled, self.time_ids, self.mask, self.guidance)
        return [*self.context, *(t for t in rest if t is not None)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Prepared:
        """A copy with `function` applied to every tensor."""
        rest = (self.pooled, self.time_ids, self.mask, self.guidance)
        applied = (None if t is None else function(t) for t in rest)
        return Prepared(tuple(map(function, self.context)), *applied)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Prepared:
        """One row for each of `index` (int64 [B]).

        Cast after selecting: a learner's tensors are float32, and so is the sum of their gradients
        over all rows that use them.
        """
        return self.map(lambda t: t.index_select(0, index).to(dtype))


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
    max_sequence_length: tokens of the longest text encoder; None: the pipeline's default.
    park_encoders, cached_prompts: see `model.encoders.TextEncoder`.
    """

    height: int | None = None
    width: int | None = None
    clip_skip: int | None = None
    negative_prompt: str | None = None
    max_sequence_length: int | None = None
    park_encoders: bool = False
    cached_prompts: int = 1024


PLAIN = Drawing()  # the model's own defaults
