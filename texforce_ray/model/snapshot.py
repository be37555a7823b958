"""What is published to rollout actors, and what a learner can be rebuilt from. Plain numpy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class LoraShape:
    """Rank, scale and places of an adapter."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]


@dataclass(frozen=True)
class PolicySnapshot:
    """The adapters of one policy version: float32 tensors by part, then by PEFT key."""

    version: int
    shape: LoraShape
    adapters: dict[str, Tensors]


@dataclass(frozen=True)
class LearnerState:
    """Everything that the next update depends on.

    version: number of iterations trained; updates: number of optimizer steps done.
    optimizer: Adam's moments, `<index>/exp_avg` and so on, in the adapter's parameter order.
    ema: averaged adapter by part, empty without EMA.
    """

    version: int
    updates: int
    adapters: dict[str, Tensors]
    optimizer: Tensors = field(default_factory=dict)
    ema: dict[str, Tensors] = field(default_factory=dict)
