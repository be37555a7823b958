"""What rewards with a torch model have in common: device, weights from a path or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texforce_ray.errors import RewardError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(device: str) -> torch.device:
    """'auto' is the GPU that Ray assigned to this server, or else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def pick_dtype(dtype: str) -> torch.dtype:
    """One of float32, float16, bfloat16.

    Raises:
        RewardError: anything else.
    """
    if dtype not in DTYPES:
        raise RewardError(f"dtype {dtype!r} should be one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def weights_file(weights: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """A file of weights: a local path, or 'owner/repository:file' on the hub (cached, pinnable).

    Raises:
        RewardError: not found; names what was looked for.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    repository, colon, name = weights.partition(":")
    if not colon:
        raise RewardError(
            f"weights {weights!r}: no such file; to load one from the hub, give "
            "owner/repository:file"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision, cache_dir=cache_dir))
    except Exception as error:  # the hub's client raises many kinds
        raise RewardError(f"weights {weights!r} cannot be downloaded: {error}") from None


def load_weights(path: Path) -> dict[str, Any]:
    """A state dict from safetensors, or from a .pt that holds only tensors: nothing is unpickled.

    Raises:
        RewardError: damaged, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RewardError(f"weights {path} cannot be read: {error}") from None
    return loaded.get("state_dict", loaded)


def load_into(model: torch.nn.Module, state: dict[str, Any], what: str) -> None:
    """Load every parameter of `model`; extra tensors in `state` are an error too.

    Raises:
        RewardError: naming the first tensors that do not fit.
    """
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise RewardError(f"weights of {what} do not fit the model: {error}") from None
    # Position ids used to be stored as buffers; now they are computed.
    unexpected = [name for name in unexpected if not name.endswith("position_ids")]
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing or unexpected:
        raise RewardError(
            f"weights of {what} do not fit the model: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}"
        )


def resize_and_crop(images: Tensor, shortest: int, crop: tuple[int, int]) -> Tensor:
    """CLIP's resize of the shortest side and centre crop, of [B, 3, H, W], with gradient."""
    height, width = images.shape[-2:]
    factor = shortest / min(height, width)
    resized = resize(images, (round(height * factor), round(width * factor)))
    top, left = ((resized.shape[-2 + i] - crop[i]) // 2 for i in range(2))
    return resized[..., top : top + crop[0], left : left + crop[1]]


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Like Pillow's bicubic resize, but without rounding to 8 bits; values stay in [0, 1]."""
    resized = torch.nn.functional.interpolate(
        images, size, mode="bicubic", antialias=True, align_corners=False
    )
    return resized.clamp(0, 1)


def standardize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std for each channel of [B, 3, H, W]."""
    shape = (1, 3, 1, 1)
    center = torch.tensor(mean, device=images.device).reshape(shape)
    return (images - center) / torch.tensor(std, device=images.device).reshape(shape)
