"""Gradients of the kernels that a wrong gradient on a GPU may come from, against float64.

On an H200 with torch 2.11, the gradient of FLUX's miniature in half precision does not agree with
that in float32, and the check before the first update refuses it. FLUX alone normalises queries and
keys by torch.nn.RMSNorm; attention picks its kernel by dtype and shape.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.long

HALF = [pytest.param(dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16)]
DTYPES = [torch.float32, *HALF]
CUDA_ONLY = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
BACKENDS = [
    SDPBackend.MATH,
    SDPBackend.FLASH_ATTENTION,
    *(pytest.param(each, marks=pytest.mark.gpu) for each in CUDA_ONLY),
]


def _gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, upstream))


def _agree(function: Callable[..., Tensor], shapes: list[tuple[int, ...]], dtype: torch.dtype,
           layout: Callable[[Tensor], Tensor], exact: Callable[..., Tensor]) -> None:  # fmt: skip
    """Gradients on the device in `dtype` point where those in float64 on a CPU do."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=draw).to(dtype)
    found = _gradients(
        function, [layout(t.to(DEVICE)) for t in inputs], layout(upstream.to(DEVICE))
    )
    expected = _gradients(exact, [t.double() for t in inputs], upstream.double())
    for own, other in zip(found, expected, strict=True):
        apart = (own.cpu().double() - other).norm() / other.norm()
        assert apart < (1e-4 if dtype == torch.float32 else 0.03)


def _in_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] as a view of [B, N, H, D]: what a linear layer's output is."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _narrowed(x: Tensor) -> Tensor:
    """A part of a longer sequence: what the gradient of a concatenation is."""
    return torch.cat([x, x], dim=1)[:, : x.shape[1]]


@pytest.mark.parametrize("layout", [torch.clone, _narrowed, _in_heads], ids=lambda f: f.__name__)
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norms_gradient(
    dtype: torch.dtype, width: int, layout: Callable[[Tensor], Tensor]
) -> None:
    norm = torch.nn.RMSNorm(width, eps=1e-6)
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    norm.requires_grad_(False)  # only adapters are trained
    weight = norm.weight.to(DEVICE, dtype)
    _agree(
        lambda x: F.rms_norm(x, (width,), weight, 1e-6),
        [(2, 24, 3, width)],
        dtype,
        layout,
        lambda x: F.rms_norm(x, (width,), weight.cpu().double(), 1e-6),
    )


@pytest.mark.parametrize("length", [32, 528, 1024])
@pytest.mark.parametrize("width", [16, 40, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda each: each.name)
def test_attentions_gradient(
    backend: SDPBackend, dtype: torch.dtype, width: int, length: int
) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    shape = (1, 2, length, width)
    if dtype == torch.float32 and DEVICE == "cuda" and backend in (
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    ):  # fmt: skip
        pytest.skip("takes half precision alone")
    if DEVICE == "cpu" and backend in CUDA_ONLY:
        pytest.skip("no CUDA device")
    _agree(attend, [shape] * 3, dtype, _in_heads, F.scaled_dot_product_attention)
