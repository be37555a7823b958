"""FLUX's layout of latents: one token for 2 x 2 of them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h/2 * w/2, 4 C]."""
    count, channels, height, width = latents.shape
    cells = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, h/2 * w/2, 4 C] to [B, C, h, w]."""
    count, _, channels = tokens.shape
    cells = tokens.reshape(count, height // 2, width // 2, channels // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(count, channels // 4, height, width)


def token_positions(height: int, width: int) -> Tensor:
    """(0, row, column) of each token: float32 [h/2 * w/2, 3]."""
    rows, columns = torch.meshgrid(
        torch.arange(height // 2), torch.arange(width // 2), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
