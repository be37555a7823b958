"""Batches for compiled networks: few sizes, on which alone all shapes depend."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def padded(count: int) -> int:
    """A batch size rounded up for compiled networks: four sizes per octave, at most 1/4 more."""
    step = max(1, 2 ** (count.bit_length() - 3))
    return -(-count // step) * step


def pad_batch(
    step: Tensor, x: Tensor, rows: np.ndarray, least: int
) -> tuple[Tensor, Tensor, np.ndarray]:
    """A batch with its last row repeated up to `padded` rows, and at least up to `least`."""
    more = max(padded(len(rows)), least) - len(rows)
    return (
        torch.cat([step, step[-1:].expand(more)]),
        torch.cat([x, x[-1:].expand(more, *x.shape[1:])]),
        np.concatenate([rows, np.repeat(rows[-1:], more)]),
    )
