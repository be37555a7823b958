"""Measures how well an image is made, whatever it shows: outlines, colours, background."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from texforce_ray.shapes.detector import FOREGROUND, PALETTE, background_of


def appearance(image: np.ndarray) -> float:
    """Mean of sharpness, purity and cleanliness of one image (uint8 [H, W, 3]), in [0, 1].

    An image without any object gets 0.
    """
    pixels = image.astype(np.float32) / 255
    away = np.linalg.norm(pixels - background_of(pixels), axis=-1)
    foreground = away > FOREGROUND
    core = ndimage.binary_erosion(foreground, iterations=3)
    if not core.any():
        return 0.0
    return (_sharpness(away, foreground) + _purity(pixels[core]) + _cleanliness(away)) / 3


def _sharpness(away: np.ndarray, foreground: np.ndarray) -> float:
    """From outline width: pixels that are neither background nor object, per outline pixel."""
    # How far a pixel's object stands out from the background.
    full = ndimage.maximum_filter(ndimage.median_filter(away, 3), 7)
    between = (away > 0.15 * full) & (away < 0.85 * full) & (full > FOREGROUND)
    outline = foreground & ~ndimage.binary_erosion(foreground)
    return _falling(between.sum() / outline.sum(), 1.9, 3.2)


def _purity(core: np.ndarray) -> float:
    """From the distance of the objects' colours [N, 3] to the nearest palette colour."""
    distance = np.linalg.norm(core[:, None] - PALETTE, axis=-1).min(-1)
    return _falling(float(np.median(distance)), 0.06, 0.14)


def _cleanliness(away: np.ndarray) -> float:
    """From how much the background varies."""
    ground = ndimage.binary_erosion(away < 0.5 * FOREGROUND, iterations=2)
    return _falling(float(np.sqrt((away[ground] ** 2).mean())), 0.02, 0.08) if ground.any() else 0.0


def _falling(value: float, good: float, bad: float) -> float:
    return float(np.clip((bad - value) / (bad - good), 0, 1))
