"""Cross-attention whose keys and values are computed once for each distinct prompt.

They depend only on the prompt, not on the latent or the timestep, so the steps of a rollout and the
(sample, timestep) pairs of an update share them. Adjacent rows of a batch with the same prompt are
folded into one longer query.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

Layers = list[Any]  # diffusers' Attention modules


class SharedAttention:
    """Attention processor of a layer. Without `keys_values`, it works as diffusers' default.

    crosses: whether it is cross-attention; all layers of a block are given the same arguments.
    """

    def __init__(self, crosses: bool) -> None:
        self.crosses = crosses

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        keys_values: Sequence[Tensor] | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """Queries float [B, N, C]; the layer's `keys_values`; see `group_rows` for `groups`."""
        query = attn.to_q(hidden_states)
        if keys_values is None or groups is None or not self.crosses:
            source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key, value = attn.to_k(source), attn.to_v(source)
        else:
            # Cast after selecting: a learner's keys and values are float32, and so is the sum of
            # their gradients over all rows that use them.
            key, value = (t.index_select(0, groups).to(query.dtype) for t in keys_values)
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
        processors[f"{name}.processor"] = SharedAttention(crosses)
        if crosses:
            block = unet.get_submodule(name.rpartition(".")[0])
            names = list(inspect.signature(block.forward).parameters)
            block.register_forward_pre_hook(_Own(len(layers), names), with_kwargs=True)
            layers.append(module)
    unet.set_attn_processor(processors)
    return layers


class _Own:
    """Hook of the block around cross-attention layer i: of all keys and values, its own pair.

    Outside of the block, so that blocks of equal shapes have equal inputs and share compiled code.
    """

    def __init__(self, layer: int, names: Sequence[str]) -> None:
        self.layer, self.names = layer, names

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(self.names, args, strict=False)) | kwargs  # checkpoints give some by place
        shared: Mapping[str, Any] = given.get("cross_attention_kwargs") or {}
        if (every := shared.get("keys_values")) is not None:
            own = every[2 * self.layer : 2 * self.layer + 2]
            given["cross_attention_kwargs"] = {**shared, "keys_values": own}
        return (), given


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
