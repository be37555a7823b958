"""Image helpers of the rewards. Needs numpy and Pillow alone."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """uint8 [B, H, W, 3] to B images."""
    return [Image.fromarray(image) for image in images]


def enlarged(image: np.ndarray, shorter_side: int) -> np.ndarray:
    """uint8 [H, W, 3], bicubic, so that its shorter side is at least `shorter_side` pixels.

    Detectors are made for photographs: a 64 x 64 image has to be enlarged for them.
    """
    height, width = image.shape[:2]
    if min(height, width) >= shorter_side:
        return np.ascontiguousarray(image)
    factor = shorter_side / min(height, width)
    size = (round(width * factor), round(height * factor))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def to_png(image: np.ndarray) -> str:
    """uint8 [H, W, 3] to a PNG file in base64: lossless, and text for JSON."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_png(text: str, max_pixels: int = 64_000_000) -> np.ndarray:
    """The inverse of `to_png`: uint8 [H, W, 3].

    Raises:
        ValueError: not an image, or one of more than `max_pixels` pixels.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"an image of {image.width} x {image.height} pixels is too large")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, of a chunk
        raise ValueError(f"not an image: {error}") from None
