"""Cross-attention whose keys and values are computed once for each distinct prompt.

They depend only on the prompt, not on the latent or the timestep, so the steps of a rollout and the
(sample, timestep) pairs of an update share them. Adjacent rows of a batch with the same prompt are
folded into one longer query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

Layers = list[Any]  # diffusers' Attention modules


class SharedAttention:
    """Attention processor of one layer. Without `keys_values`, it works as diffusers' default."""

    def __init__(self, layer: int | None) -> None:
        self.layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        keys_values: Sequence[Tensor] | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """Queries float [B, N, C]; see `Prepared` for `keys_values`, `group_rows` for `groups`."""
        query = attn.to_q(hidden_states)
        if keys_values is None or groups is None or self.layer is None:
            source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key, value = attn.to_k(source), attn.to_v(source)
        else:
            # Cast after selecting: a learner's keys and values are float32, and so is the sum of
            # their gradients over all rows that use them.
            key, value = (
                t.index_select(0, groups).to(query.dtype) for t in _pair(keys_values, self.layer)
            )
            query = query.reshape(len(key), -1, query.shape[-1])
        query, key, value = (
            t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value)
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = out.transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
        return attn.to_out[1](attn.to_out[0](out))


def install(unet: UNet2DConditionModel) -> Layers:
    """Replace the processors of all attention layers; returns the cross-attention layers."""
    layers: Layers = []
    processors = {}
    for name, module in unet.named_modules():
        if not name.endswith(("attn1", "attn2")):
            continue
        crosses = name.endswith("attn2")
        processors[f"{name}.processor"] = SharedAttention(len(layers) if crosses else None)
        if crosses:
            layers.append(module)
    unet.set_attn_processor(processors)
    return layers


def keys_values(layers: Layers, hidden: Tensor) -> tuple[Tensor, ...]:
    """Keys and values of every layer for embeddings [P, L, D]: k0, v0, k1, ...; [P, L, C] each."""
    return tuple(t for layer in layers for t in (layer.to_k(hidden), layer.to_v(hidden)))


def group_rows(rows: np.ndarray) -> np.ndarray:
    """Fold adjacent rows (int64 [B]) with equal prompts: int64 [G], B a multiple of G.

    Group g stands for rows g * B/G to (g + 1) * B/G, which all have its prompt.
    """
    changes = np.flatnonzero(np.diff(rows)) + 1
    length = int(np.gcd.reduce(np.append(changes, len(rows))))
    return rows[::length]


def _pair(keys_values: Sequence[Tensor], layer: int) -> Sequence[Tensor]:
    return keys_values[2 * layer : 2 * layer + 2]
