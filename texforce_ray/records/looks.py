"""Compact data for comparing how images look: a thumbnail, a style and artefacts of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from texforce_ray.records.spectrum import artefacts

_SIZE = (16, 16)  # of a thumbnail
_LEVELS = 32  # quantiles of each of a style's distributions
_PAIRED = 32  # images of a prompt whose pairs are compared


@dataclass(frozen=True)
class Looks:
    """Of N images: thumbnails, uint8 [N, 16, 16, 3], styles, float32 [N, K], artefacts, [N, 2].

    A style is the distributions of an image's colours, edges and textures, without their positions:
    quantiles of each colour channel, of the strength of edges and of the local contrast. Artefacts
    (float64) are the two numbers of `spectrum.artefacts`.
    """

    thumbnails: np.ndarray
    styles: np.ndarray
    artefacts: np.ndarray

    @staticmethod
    def of(images: np.ndarray) -> Looks:
        """From images, uint8 [N, H, W, 3]."""
        small = [np.array(Image.fromarray(image).resize(_SIZE)) for image in images]
        styles = np.stack([_style(image) for image in images])
        return Looks(np.stack(small), styles, np.array([artefacts(image) for image in images]))

    @staticmethod
    def joined(parts: Sequence[Looks]) -> Looks:
        return Looks(
            np.concatenate([part.thumbnails for part in parts]),
            np.concatenate([part.styles for part in parts]),
            np.concatenate([part.artefacts for part in parts]),
        )

    def diversity(self, prompts: Sequence[str]) -> float:
        """Mean distance of two images of one prompt, 0 to 1; it falls when a policy collapses.

        Root mean square over a thumbnail's pixels. NaN if no prompt has two images.
        """
        found = []
        for prompt in dict.fromkeys(prompts):
            rows = [i for i, other in enumerate(prompts) if other == prompt][:_PAIRED]
            pixels = self.thumbnails[rows].reshape(len(rows), -1) / 255
            first, second = np.triu_indices(len(rows), 1)
            if len(first):
                distance = np.sqrt(((pixels[first] - pixels[second]) ** 2).mean(axis=1))
                found.append(distance.mean())
        return float(np.mean(found)) if found else float("nan")

    def drift(self, base: Looks) -> float:
        """Mean distance of each image from `base`'s at the same seed, 0 to 1, pixel by pixel."""
        difference = (self.thumbnails - base.thumbnails.astype(np.float64)) / 255
        return float(np.sqrt((difference**2).mean(axis=(1, 2, 3))).mean())

    def style_drift(self, base: Looks) -> float:
        """Mean distance of each image's style from that of `base`'s at the same seed, 0 to 1.

        The Wasserstein distance of each distribution, averaged: mere movement does not count.
        """
        return float(np.abs(self.styles - base.styles).mean())

    def artefact_means(self) -> dict[str, float]:
        """Means over the images: `high_frequency` and `grid`, explained in `spectrum.artefacts`."""
        high_frequency, grid = self.artefacts.mean(axis=0).tolist()
        return {"high_frequency": high_frequency, "grid": grid}


def _style(image: np.ndarray) -> np.ndarray:
    pixels = image.astype(np.float32) / 255
    light = pixels.mean(axis=-1)
    edges = np.hypot(*np.gradient(light))
    mean = ndimage.uniform_filter(light, 5)
    contrast = np.sqrt(np.maximum(ndimage.uniform_filter(light**2, 5) - mean**2, 0))
    levels = (np.arange(_LEVELS) + 0.5) / _LEVELS
    parts = [*pixels.reshape(-1, 3).T, edges, contrast]
    return np.concatenate([np.quantile(part, levels) for part in parts]).astype(np.float32)
