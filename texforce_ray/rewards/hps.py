"""Human preference scores HPS v2 and v2.1 (Wu et al. 2023), through open_clip.

Not the hpsv2 package: it pins old packages and lacks its own vocabulary file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from texforce_ray.rewards.images import to_pil
from texforce_ray.rewards.torch_models import (
    load_into,
    load_weights,
    pick_device,
    pick_dtype,
    resize,
    standardize,
    weights_file,
)


class HpsV2:
    """Cosine of image and prompt under ViT-H-14 tuned on human choices: mostly .2 to .3."""

    default_weights = "xswu/HPSv2:HPS_v2_compressed.pt"

    def __init__(
        self,
        weights: str | None = None,
        architecture: str = "ViT-H-14",
        revision: str | None = None,
        cache_dir: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.device, self.dtype = pick_device(device), pick_dtype(dtype)
        weights = weights or self.default_weights
        self.model = open_clip.create_model(architecture, pretrained=None)
        load_into(self.model, load_weights(weights_file(weights, revision, cache_dir)), weights)
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.tokenize = open_clip.get_tokenizer(architecture)
        size = self.model.visual.image_size
        self.size = size if isinstance(size, int) else size[0]
        self.mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
        self.std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]

    def prepare(self, image: Image.Image) -> Tensor:
        """Longest side resized to the model's size (bicubic), black padding, normalised: [3, S, S].

        As in the HPS authors' copy of open_clip (`resize_longest_max`).
        """
        factor = self.size / max(image.size)
        if factor != 1:
            size = (round(image.width * factor), round(image.height * factor))
            image = image.resize(size, Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (self.size, self.size))
        canvas.paste(image, ((self.size - image.width) // 2, (self.size - image.height) // 2))
        pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std

    @torch.no_grad()
    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Scores of uint8 [B, H, W, 3] in one forward pass; equal prompts are encoded once."""
        del metadata
        pixels = torch.stack([self.prepare(image) for image in to_pil(images)])
        return self._cosine(pixels, prompts).tolist()

    def score_differentiable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of float [B, 3, H, W] in [0, 1] with gradient: float32 [B]."""
        height, width = images.shape[-2:]
        factor = self.size / max(height, width)
        resized = resize(images.float(), (round(height * factor), round(width * factor)))
        height, width = resized.shape[-2:]
        top, left = (self.size - height) // 2, (self.size - width) // 2
        edges = (left, self.size - width - left, top, self.size - height - top)
        canvas = torch.nn.functional.pad(resized, edges)
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        return self._cosine(standardize(canvas, mean, std), prompts)

    def _cosine(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        distinct = list(dict.fromkeys(prompts))
        with torch.no_grad():
            tokens = self.tokenize(distinct).to(self.device)
            texts = normalize(self.model.encode_text(tokens).float(), dim=-1)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=texts.device)
        encoded = self.model.encode_image(pixels.to(self.device, self.dtype))
        return (normalize(encoded.float(), dim=-1) * texts[rows]).sum(dim=-1)


class HpsV21(HpsV2):
    """HPS v2.1: the same model, tuned on more and better choices."""

    default_weights = "xswu/HPSv2:HPS_v2.1_compressed.pt"
