"""The gradient of a loss over many (sample, step) pairs, with one pass through the text encoder.

Each distinct prompt's cross-attention keys and values are detached from the encoder, their gradient
is accumulated over all pairs through the denoiser, and one backward pass carries it into the
adapter: the same gradient as plain autograd's, with T - 1 fewer encoder passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.model.conditioning import Conditioning, Prepared
from texforce_ray.rl.likelihood import Likelihood, Pairs
from texforce_ray.rl.precision import to_encoder

# The summed loss of some pairs, given the prepared prompts and each pair's index into them.
Loss = Callable[[Pairs, Prepared, np.ndarray], Tensor]
# A loss of the prompts' embeddings themselves, given each sample's index into them.
EmbeddingLoss = Callable[[Conditioning, np.ndarray], Tensor]


def gradient_of(
    likelihood: Likelihood,
    parameters: Sequence[nn.Parameter],
    trajectory: Trajectory,
    pairs: Pairs,
    loss: Loss,
    *,
    microbatch_size: int,
    scale: float,
    embedding_loss: EmbeddingLoss | None = None,
) -> list[Tensor]:
    """One tensor for each parameter: the gradient of the sum of `loss` over all pairs.

    `scale` multiplies the loss in the backward passes alone, against underflow in half precision.
    """
    rows, local = np.unique(pairs.sample, return_inverse=True)
    with torch.enable_grad():
        conditioning, prompt = likelihood.encode(trajectory, rows)
        prepared = likelihood.denoiser.prepare(conditioning)
        # In float32, so that the gradients of all pairs add up in float32.
        leaf = prepared.map(lambda t: t.detach().float().requires_grad_(t.requires_grad))
        for parameter in parameters:
            parameter.grad = None
        for chunk in likelihood.chunks(pairs, microbatch_size):
            part = pairs[chunk]
            (loss(part, leaf, prompt[local[chunk]]) * scale).backward()
        through = [
            (out, cut.grad)
            for out, cut in zip(prepared.tensors(), leaf.tensors(), strict=True)
            if cut.grad is not None
        ]
        parts: list[Sequence[Tensor | None]] = [[p.grad for p in parameters]]
        keep = embedding_loss is not None
        if through:
            outputs = [out for out, _ in through]
            parts.append(_through(outputs, [sums for _, sums in through], parameters, keep))
        if embedding_loss is not None:
            # A pass of its own: in half precision the two gradients differ by orders of magnitude.
            cut, outputs = _cut(conditioning)
            inner = [t for t in (cut.hidden, cut.pooled) if t is not None and t.requires_grad]
            away = torch.autograd.grad(embedding_loss(cut, prompt) * scale, inner)
            parts.append(_through(outputs, away, parameters))
        return [
            _sum(p, gradients) / scale for p, *gradients in zip(parameters, *parts, strict=True)
        ]


def _cut(conditioning: Conditioning) -> tuple[Conditioning, list[Tensor]]:
    """The embeddings as float32 leaves, and those of the encoder that have a gradient."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.detach().float().requires_grad_(tensor.requires_grad)

    hidden, pooled = leaf(conditioning.hidden), leaf(conditioning.pooled)
    assert hidden is not None
    tensors = [t for t in (conditioning.hidden, conditioning.pooled) if t is not None]
    cut = replace(conditioning, hidden=hidden, pooled=pooled)
    return cut, [t for t in tensors if t.requires_grad]


def _through(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    keep: bool = False,
) -> list[Tensor | None]:
    """Gradients of `outputs` (float32) carried back to the parameters; `keep`: the graph."""
    scaled, inverse = to_encoder(gradients, outputs)
    # SDXL does not read an encoder's last layer, which then has no gradient.
    found = torch.autograd.grad(outputs, parameters, scaled, allow_unused=True, retain_graph=keep)
    return [None if gradient is None else gradient * inverse for gradient in found]


def _sum(parameter: Tensor, parts: Sequence[Tensor | None]) -> Tensor:
    """The sum of a parameter's partial gradients, 0 if it has none."""
    present = [part for part in parts if part is not None]
    return torch.stack(present).sum(0) if present else torch.zeros_like(parameter)
