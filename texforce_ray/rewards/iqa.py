"""Any no-reference metric of pyiqa, signed so that higher is better."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from texforce_ray.errors import RewardError
from texforce_ray.rewards.torch_models import pick_device, weights_file


class IqaReward:
    """`iqa:<metric>`: topiq_nr-face (the paper's face reward), topiq_iaa, musiq, piqe, ...

    Metrics where lower is better are negated. Face metrics give an image without a face the worst
    score of their range: it counts as a bad face, not as an unscored image.
    """

    def __init__(
        self,
        metric: str,
        weights: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        options: dict[str, Any] | None = None,
    ) -> None:
        import pyiqa

        if dtype != "float32":
            raise RewardError(f"reward iqa:{metric}: dtype {dtype!r} should be float32")
        if metric not in pyiqa.list_models():
            raise RewardError(
                f"reward iqa:{metric}: pyiqa has no such metric; it has "
                f"{', '.join(pyiqa.list_models(metric_mode='NR'))}"
            )
        if weights is not None:
            path = weights_file(weights, revision, cache_dir)
            options = {"pretrained_model_path": str(path)} | (options or {})
        self.device = pick_device(device)
        self.metric = pyiqa.create_metric(metric, device=self.device, **(options or {}))
        if self.metric.metric_mode != "NR":
            raise RewardError(
                f"reward iqa:{metric} compares with a reference image, which a reward does not have"
            )
        self.sign = -1.0 if self.metric.lower_better else 1.0
        self.faces = "-face" in metric
        self.floor = worst(self.metric.score_range, self.metric.lower_better)

    @torch.no_grad()
    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Scores of uint8 [B, H, W, 3]: in one forward pass, except for face metrics."""
        del prompts, metadata
        pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float().to(self.device) / 255
        if self.faces:  # pyiqa crops faces one image at a time
            return [self._face(image[None]) for image in pixels]
        return (self.sign * self.metric(pixels).double().reshape(len(images))).tolist()

    def _face(self, image: torch.Tensor) -> float:
        try:
            return self.sign * float(self.metric(image))
        except AssertionError as error:
            if "face" not in str(error).lower():
                raise
            return self.floor


def worst(score_range: str | None, lower_better: bool) -> float:
    """The worst reward of a range that pyiqa writes as '0, 100' or '~0, ~1'; 0 if unknown."""
    ends = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", score_range or "")]
    if len(ends) != 2:
        return 0.0
    return -max(ends) if lower_better else min(ends)
