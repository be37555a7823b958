"""Model FLOPs of a sample and of a trained pair, and the device's measured peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from texforce_ray.model.backbone import Backbone

_TRIES = 12


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    (batch, heads, length, size), keys, width = query, key[2], value[3]
    return 2 * batch * heads * length * keys * (size + width)


def _attention_backward(_: Any, *shapes: Any, **__: Any) -> int:
    # As PyTorch counts it elsewhere: five products for the forward pass's two.
    return _attention(*shapes) * 5 // 2


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        function()
    return int(counter.get_total_flops())


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this process's fastest large matrix product: the reference for utilisation."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def seconds() -> float:
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return 2 * n**3 / min(seconds() for _ in range(_TRIES))


def sample_flops(backbone: Backbone, steps: int, guidance_scale: float) -> int:
    """FLOPs of one sampled image: all its passes through the U-Net, and the decoder.

    Without the work per prompt: text encoder, cross-attention's keys and values.
    """
    passes = steps * backbone.passes(guidance_scale)
    x, timestep, given = _one(backbone)
    with torch.no_grad(), backbone.eager():
        prepared, rows = backbone.prepare(given), np.zeros(1, dtype=np.int64)
        unet = count_flops(lambda: backbone.predict_prepared(x, timestep, prepared, rows))
        return passes * unet + count_flops(lambda: backbone.decode(x))


class PassFlops(NamedTuple):
    """FLOPs of an update's passes for one image, without guidance.

    forward, backward: of the denoiser. decoded: of the VAE's decoder, both ways; 0 if not counted.
    """

    forward: float
    backward: float
    decoded: float

    @property
    def trained(self) -> float:
        """The denoiser, both ways."""
        return self.forward + self.backward


def pass_flops(backbone: Backbone, *, decoder: bool = False) -> PassFlops:
    """FLOPs of one pass through the denoiser and, if asked for, the decoder; nothing twice.

    The decoder's backward pass takes a lot of memory; only direct backpropagation makes it.
    """
    x, timestep, given = _one(backbone)
    with torch.enable_grad(), backbone.eager(), _activations_kept(backbone.denoiser):
        prepared = backbone.prepare(given)
        leaf = prepared.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
        rows = np.zeros(1, dtype=np.int64)
        forward = count_flops(lambda: backbone.predict_prepared(x, timestep, leaf, rows))
        out = backbone.predict_prepared(x, timestep, leaf, rows)
        backward = count_flops(lambda: torch.autograd.grad(out.float().sum(), leaf.context))
        decoded = 0
        if decoder:
            x.requires_grad_()
            decoded = count_flops(lambda: backbone.decode_pixels(x).float().sum().backward())
    return PassFlops(forward, backward, decoded)


@contextmanager
def _activations_kept(denoiser: Any) -> Iterator[None]:
    """Without gradient checkpointing, whose recomputation is work that is not needed."""
    if not getattr(denoiser, "is_gradient_checkpointing", False):  # not all are diffusers' models
        yield
        return
    denoiser.disable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.enable_gradient_checkpointing()


def pair_flops(backbone: Backbone, guidance_scale: float) -> int:
    """FLOPs of one (sample, timestep) pair of an update: the U-Net, forward and backward."""
    return int(pass_flops(backbone).trained * backbone.passes(guidance_scale))


def _one(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor, Any]:
    x = torch.zeros(1, *backbone.latent_shape, device=backbone.device)
    with torch.no_grad():
        given = backbone.with_guidance(backbone.encode_empty(), 1.0)
        return x, torch.zeros(1, dtype=torch.long, device=x.device), given
