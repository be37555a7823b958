"""The shapes world's learned reward: a network's estimate of the detector's score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from texforce_ray.rewards.torch_models import pick_device
from texforce_ray.shapes.scorer import describe_prompts, load_scorer


class ShapesScorer:
    """Match of image and prompt in [0, 1]; differentiable, and sometimes wrong."""

    def __init__(self, device: str = "auto") -> None:
        self.device = pick_device(device)
        self.scorer = load_scorer().to(self.device)

    @torch.no_grad()
    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Scores of uint8 [B, H, W, 3] in one forward pass."""
        del metadata
        pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
        return self.score_differentiable(pixels, prompts).tolist()

    def score_differentiable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of float [B, 3, H, W] in [0, 1] with gradient: float32 [B]."""
        scenes = describe_prompts(prompts).to(self.device)
        return self.scorer(images.float().to(self.device), scenes)
