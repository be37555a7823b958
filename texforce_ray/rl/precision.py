"""Gradients in half precision: the scale that keeps them from underflowing, and a check of them.

A loss that is a mean over latent dimensions (16,384 in Stable Diffusion) and over a minibatch's
pairs enters the U-Net as a gradient near 1e-7: float16 rounds it to zero. So the loss is scaled
before the backward pass and the float32 gradient is divided by the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from texforce_ray.errors import is_out_of_memory
from texforce_ray.model.backbone import Backbone

# Sums over pairs enter the encoder at 2^4: twelve binary orders below float16's largest number.
_ENCODER_EXPONENT = 4
_MOST_EXPONENT = 126  # of a normal float32
_OTHER_SCALE = 2.0**-6


def loss_scale(valid: int, latent_shape: Sequence[int]) -> float:
    """The factor that undoes a loss's division by `valid` pairs and the latent's dimensions.

    Static and deterministic: it depends on counts alone. A power of two, so that in float32 a
    gradient that is scaled and unscaled keeps every bit.
    """
    return 2.0 ** math.ceil(math.log2(max(1, valid) * math.prod(latent_shape)))


def to_encoder(
    gradients: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor | float]:
    """Float32 gradients of `outputs`, times a power of two, in the outputs' dtype; and its inverse.

    They are sums over all pairs of a minibatch, too large or too small for half precision. In
    float32 the factor is 1 and nothing changes. The factor stays on the device: reading it would
    wait for all of the minibatch's work.
    """
    if all(output.dtype in (torch.float32, torch.float64) for output in outputs):
        return list(gradients), 1.0
    largest = torch.stack([gradient.abs().amax() for gradient in gradients]).amax()
    _, exponent = torch.frexp(largest)
    shift = (_ENCODER_EXPONENT - exponent).clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    factor, inverse = _power_of_two(shift), _power_of_two(-shift)
    scaled = (gradient * factor for gradient in gradients)
    return [g.to(output.dtype) for g, output in zip(scaled, outputs, strict=True)], inverse


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float32, exactly on every device: its bits, not a call of exp2."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


@dataclass(frozen=True)
class Agreement:
    """Two gradients' cosine, and the share of entries that only the first one lost to zero."""

    cosine: float
    zeros: float


def agreement(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Agreement:
    """How well gradient `found` matches `exact`; both are lists of tensors of the same shapes.

    A gradient of only zeros agrees with nothing.
    """
    one = torch.cat([t.detach().double().reshape(-1) for t in found])
    other = torch.cat([t.detach().double().reshape(-1) for t in exact])
    present = other != 0
    if not bool(present.any()):
        return Agreement(0.0, 1.0)
    lost = (one[present] == 0).double().mean()
    norm = float(one.norm() * other.norm())
    if not math.isfinite(norm):
        return Agreement(0.0, float(lost))
    return Agreement(float(one @ other) / norm if norm else 0.0, float(lost))


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Temporarily disable TF32, which has no more bits than float16."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        products.allow_tf32 = convolutions.allow_tf32 = False
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@contextmanager
def in_float32(backbone: Backbone) -> Iterator[None]:
    """Temporarily convert all frozen weights to float32, uncompiled.

    float16 and bfloat16 survive the round trip bit for bit. Each tensor replaces its original, so
    the peak is the float32 model alone.

    Raises:
        torch.OutOfMemoryError: they do not fit; the original weights are then restored.
    """
    modules = [backbone.denoiser, backbone.vae, *backbone.text_encoders]
    tensors = [
        tensor
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    dtypes = [tensor.dtype for tensor in tensors]
    try:
        with backbone.same_noise(), _no_tf32(), backbone.eager():
            for tensor in tensors:
                tensor.data = tensor.data.float()
            yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


def probed_in_float32(backbone: Backbone, probe: Callable[[], list[Tensor]]) -> list[Tensor] | None:
    """The result of `probe` with float32 weights; None if the device's memory is too small.

    The error is released before this returns, and with it the tensors that its frames held.
    """
    try:
        with in_float32(backbone):
            return probe()
    except (RuntimeError, MemoryError) as error:  # CUDA's libraries word it differently
        if not is_out_of_memory(error):
            raise
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def compare(
    backbone: Backbone,
    probe: Callable[[], list[Tensor]],
    scaled: Callable[[float], AbstractContextManager[None]],
) -> tuple[Agreement, str]:
    """Compare a small gradient in half precision with the same in float32.

    If float32 weights do not fit, compare with the same gradient under another loss scale, where
    other values underflow or overflow.

    Args:
        backbone: in half precision.
        probe: computes the gradient of a few samples.
        scaled: a context in which the loss has an extra factor in the backward pass.

    Returns:
        The agreement, and what the gradient was compared with.
    """
    found, beside = probe(), "float32"
    exact = probed_in_float32(backbone, probe)
    if exact is None:
        beside = "another loss scale"
        with scaled(_OTHER_SCALE):
            exact = probe()
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()  # not needed again, and others may share the device
    if beside == "float32" and not any(bool(t.any()) for t in exact):
        return Agreement(1.0, 0.0), beside  # the true gradient is 0, e.g. if all are masked
    return agreement(found, exact), beside
