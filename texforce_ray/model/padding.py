"""Batches for compiled networks: few sizes, on which alone all shapes depend."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def padded(count: int) -> int:
    """A batch size rounded up for compiled networks: four sizes per octave, at most 1/4 more."""
    step = max(1, 2 ** (count.bit_length() - 3))
    return -(-count // step) * step


def pad_batch(x: Tensor, timesteps: Tensor, rows: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
    """A batch with its last row repeated up to `padded` rows: masking leaves any size."""
    more = padded(len(rows)) - len(rows)
    return (
        torch.cat([x, x[-1:].expand(more, *x.shape[1:])]),
        torch.cat([timesteps, timesteps[-1:].expand(more)]),
        np.concatenate([rows, np.repeat(rows[-1:], more)]),
    )
