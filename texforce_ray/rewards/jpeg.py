"""JPEG file size as a reward (DDPO, section 5; TexForce, section 4): not differentiable."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


class JpegIncompressibility:
    """Size of the image as JPEG in kB (1000 bytes): detailed images score high."""

    def __init__(self, quality: int = 95) -> None:
        self.quality = quality

    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Kilobytes of each image, uint8 [B, H, W, 3]."""
        del prompts, metadata
        return [self._kilobytes(image) for image in images]

    def _kilobytes(self, image: np.ndarray) -> float:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell() / 1000


class JpegCompressibility(JpegIncompressibility):
    """Minus the size of the image as JPEG in kB: smooth images score high."""

    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Negative kilobytes of each image, uint8 [B, H, W, 3]."""
        return [-size for size in super().score(images, prompts, metadata)]
