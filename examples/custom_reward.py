"""Your own reward, with a package of its own: how much of the image has the requested colour.

    python -m texforce_ray.rewards.check --config examples/custom_reward.yaml   # try it
    python -m texforce_ray.run --config examples/custom_reward.yaml             # train with it

The config names this class and its requirement. The core does not have webcolors, so the reward's
servers run in an environment of their own, which is built once on each node. It holds numpy, Ray
and the packages in `requirements`, but no torch: import only what you list there.
"""

from __future__ import annotations

import numpy as np
import webcolors


class NamedColour:
    """Share of pixels near the first CSS colour that the prompt names; from 0 to 1.

    tolerance: largest distance of a pixel, in units of the RGB cube's side.
    """

    def __init__(self, tolerance: float = 0.35) -> None:
        self.tolerance = tolerance

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        """images: uint8 [B, H, W, 3], read-only. A prompt without a colour gets NaN: not scored."""
        return [self._share(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _share(self, image: np.ndarray, prompt: str) -> float:
        wanted = next(filter(None, map(self._colour, prompt.lower().split())), None)
        if wanted is None:
            return float("nan")
        distance = np.abs(image.astype(np.float32) - wanted).max(axis=-1) / 255
        return float((distance <= self.tolerance).mean())

    @staticmethod
    def _colour(word: str) -> tuple[int, int, int] | None:
        try:
            return tuple(webcolors.name_to_rgb(word))
        except ValueError:
            return None
