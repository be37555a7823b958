"""What is published to rollout actors, and what a learner can be rebuilt from. Plain numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Tensors = dict[str, np.ndarray]


# What an adapter can be on, by the pipeline's names; the order in which parameters are kept.
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
UNET = "unet"
PARTS = (*TEXT_ENCODERS, UNET)


class Effect(NamedTuple):
    """What a process holds of a policy version: see `model.effect`.

    digest: of the adapter's bits. change: of a probe prompt's embedding against the base model,
    relative. denoiser: likewise, of the output of the U-Net's first adapted layer. Both are 0 of an
    adapter that changes nothing. layers: in how many it is switched on.
    """

    digest: int
    change: float
    denoiser: float = 0.0
    layers: int = 0


@dataclass(frozen=True)
class LoraShape:
    """Rank, scale and places of one part's adapter: the update is alpha / rank * B A."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]


@dataclass(frozen=True)
class PolicySnapshot:
    """The adapters of one policy version: shapes by part; float32 tensors by part and PEFT key."""

    version: int
    shapes: dict[str, LoraShape]
    adapters: dict[str, Tensors]

    @property
    def changes(self) -> bool:
        """Whether it is not the base model: some product B A is not zero."""
        tensors = [(k, v) for part in self.adapters.values() for k, v in part.items()]
        return any(v.any() for k, v in tensors if k.endswith("lora_B.weight"))


@dataclass(frozen=True)
class LearnerState:
    """Everything that the next update depends on.

    version: number of iterations trained; updates: number of optimizer steps done.
    optimizer: Adam's moments, `<index>/exp_avg` and so on, in the adapter's parameter order.
    ema: averaged parameters, `parameters/<index>` in the same order; empty without EMA.
    skipped: updates in a row that were left out, up to now.
    """

    version: int
    updates: int
    adapters: dict[str, Tensors]
    optimizer: Tensors = field(default_factory=dict)
    ema: dict[str, Tensors] = field(default_factory=dict)
    skipped: int = 0
