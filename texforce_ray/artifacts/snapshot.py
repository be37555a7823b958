"""What rollout actors receive, and what a learner can be rebuilt from. Plain numpy."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Tensors = dict[str, np.ndarray]


# Parts that can have an adapter, by the pipeline's names, in the order of their parameters.
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
UNET, TRANSFORMER = "unet", "transformer"
DENOISERS = (UNET, TRANSFORMER)
PARTS = (*TEXT_ENCODERS, *DENOISERS)
# The first parts' offsets keep the bits of adapters that were trained before offsets had names.
_OFFSETS = {"text_encoder": 0, "text_encoder_2": 1, UNET: 2}


def seed_offset(part: str) -> int:
    """Added to the run's seed for a part's initial weights.

    It depends on the name alone, so adding a part later does not change the others.
    """
    return _OFFSETS[part] if part in _OFFSETS else zlib.crc32(part.encode())


class Effect(NamedTuple):
    """A policy version as measured in the process that holds it: see `model.effect`.

    digest: of the adapter's bits. change: relative change of a probe prompt's embedding against the
    base model. denoiser: likewise for the output of the denoiser's first adapted layer. Both are 0
    for an adapter that changes nothing. layers: the number in which it is switched on.
    """

    digest: int
    change: float
    denoiser: float = 0.0
    layers: int = 0


@dataclass(frozen=True)
class LoraShape:
    """Rank, scale and layers of one part's adapter: the update is alpha / rank * B A."""

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
        """Whether it differs from the base model: some B is not zero."""
        tensors = [(k, v) for part in self.adapters.values() for k, v in part.items()]
        return any(v.any() for k, v in tensors if k.endswith("lora_B.weight"))


@dataclass(frozen=True)
class LearnerState:
    """What the next update depends on besides the adapter and its average.

    version: number of iterations trained; updates: number of optimizer steps done.
    optimizer: Adam's moments, `<index>/exp_avg` and so on, in the adapter's parameter order.
    skipped: number of updates skipped in a row, up to now. own: what the objective keeps besides.
    """

    version: int
    updates: int
    optimizer: Tensors = field(default_factory=dict)
    skipped: int = 0
    own: Tensors = field(default_factory=dict)


class Learned(NamedTuple):
    """What a learner publishes of one version: all that another learner needs to continue.

    snapshot: what samples the next iteration. average: what is evaluated and exported, if that is
    another adapter, such as the moving average.
    """

    snapshot: PolicySnapshot
    state: LearnerState
    average: PolicySnapshot | None
