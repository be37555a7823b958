"""The shapes world's reward: does the image show what the prompt asks for?"""

from __future__ import annotations

from typing import Any

import numpy as np

from texforce_ray.shapes import captions, detector


class ShapesReward:
    """Colour, form, number and position as found in the image, in [0, 1]; 1 on true renderings."""

    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Match of each image, uint8 [B, H, W, 3], with its prompt.

        Raises:
            ValueError: a prompt that does not describe a scene of the shapes world.
        """
        del metadata
        scenes = [captions.understand(prompt) for prompt in prompts]
        return [detector.score(image, s) for image, s in zip(images, scenes, strict=True)]
