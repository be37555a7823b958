"""The shapes world's second reward: is the image well made, whatever it shows?"""

from __future__ import annotations

from typing import Any

import numpy as np

from texforce_ray.shapes.appearance import appearance


class AppearanceReward:
    """Crisp outlines, pure colours and a clean background, in [0, 1]; prompts are ignored."""

    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Appearance of each image, uint8 [B, H, W, 3]."""
        del prompts, metadata
        return [appearance(image) for image in images]
