"""Rewards based on a CLIP model from transformers: CLIP score, PickScore, LAION aesthetics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import normalize

from texforce_ray.errors import RewardError
from texforce_ray.rewards.images import to_pil
from texforce_ray.rewards.torch_models import (
    load_into,
    load_weights,
    pick_device,
    pick_dtype,
    resize_and_crop,
    standardize,
    weights_file,
)

# Pillow's resize needs no torchvision and is what the reference pipelines used; in transformers 4,
# the class has the plain name.
_Pil: Any = getattr(transformers, "CLIPImageProcessorPil", None)
_ImageProcessor: Any = _Pil or transformers.CLIPImageProcessor


class _Clip:
    """A CLIP model with its tokenizer and image preparation."""

    def __init__(
        self,
        weights: str,
        processor: str | None,
        revision: str | None,
        cache_dir: str | None,
        device: str,
        dtype: str,
    ) -> None:
        self.device, self.dtype = pick_device(device), pick_dtype(dtype)
        where = {"revision": revision, "cache_dir": cache_dir}
        # A revision belongs to one repository: it cannot pin a processor from another one.
        side = {"cache_dir": cache_dir} if processor else where
        try:
            model = transformers.CLIPModel.from_pretrained(weights, **where)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                processor or weights, **side
            )
            self.prepare = _ImageProcessor.from_pretrained(processor or weights, **side)
        except (OSError, ValueError) as error:
            raise RewardError(f"cannot load CLIP from {weights!r}: {error}") from None
        self.model: Any = model.to(self.device, self.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def images(self, images: np.ndarray) -> Tensor:
        """Unit embeddings of uint8 [B, H, W, 3]: float32 [B, D]."""
        return self.embed(self.prepare(to_pil(images), return_tensors="pt").pixel_values)

    def embed(self, pixels: Tensor) -> Tensor:
        """Unit embeddings of prepared pixels [B, 3, S, S], with gradient: float32 [B, D]."""
        output = self.model.vision_model(pixel_values=pixels.to(self.device, self.dtype))
        return normalize(self.model.visual_projection(output.pooler_output).float(), dim=-1)

    def images_differentiable(self, images: Tensor) -> Tensor:
        """Unit embeddings of float [B, 3, H, W] in [0, 1], prepared in torch, with gradient."""
        size, crop = self.prepare.size["shortest_edge"], self.prepare.crop_size
        mean, std = self.prepare.image_mean, self.prepare.image_std
        pixels = resize_and_crop(images.float(), size, (crop["height"], crop["width"]))
        return self.embed(standardize(pixels, mean, std))

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Unit embeddings of texts, truncated at the encoder's limit: float32 [B, D]."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        output = self.model.text_model(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device),
        )
        return normalize(self.model.text_projection(output.pooler_output).float(), dim=-1)


class ClipScore:
    """Cosine of image and prompt embeddings, -1 to 1 (Radford et al. 2021, CLIP)."""

    def __init__(
        self,
        weights: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.clip = _Clip(weights, processor, revision, cache_dir, device, dtype)
        self.scale = 1.0

    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Scores of uint8 [B, H, W, 3] in one forward pass; equal prompts are encoded once."""
        del metadata
        return self._cosine(self.clip.images(images), prompts).tolist()

    def score_differentiable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of float [B, 3, H, W] in [0, 1] with gradient: float32 [B]."""
        return self._cosine(self.clip.images_differentiable(images), prompts)

    def _cosine(self, embeddings: Tensor, prompts: Sequence[str]) -> Tensor:
        distinct = list(dict.fromkeys(prompts))
        texts = self.clip.texts(distinct)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=texts.device)
        return self.scale * (embeddings * texts[rows]).sum(dim=-1)


class PickScore(ClipScore):
    """PickScore v1: CLIP-H tuned on human choices (Kirstain et al. 2023, Pick-a-Pic).

    The logit scale times the cosine, as its model card computes it: about 15 to 28.
    """

    def __init__(
        self,
        weights: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision: str | None = None,
        cache_dir: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        super().__init__(weights, processor, revision, cache_dir, device, dtype)
        self.scale = float(self.clip.model.logit_scale.exp())


class AestheticHead(nn.Module):
    """The regression head of improved-aesthetic-predictor: [B, D] to [B, 1]; no activations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Aesthetic:
    """LAION aesthetic predictor V2: a head on CLIP-L image embeddings, about 1 to 10."""

    def __init__(
        self,
        weights: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
        processor: str | None = None,
        revision: str | None = None,
        head_revision: str | None = None,
        cache_dir: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.clip = _Clip(weights, processor, revision, cache_dir, device, dtype)
        self.head = AestheticHead(self.clip.model.config.projection_dim)
        load_into(self.head, load_weights(weights_file(head, head_revision, cache_dir)), head)
        self.head.to(self.clip.device).eval().requires_grad_(False)

    @torch.no_grad()
    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Scores of uint8 [B, H, W, 3] in one forward pass; prompts are ignored."""
        del prompts, metadata
        return self.head(self.clip.images(images)).squeeze(-1).tolist()

    def score_differentiable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of float [B, 3, H, W] in [0, 1] with gradient: float32 [B]."""
        del prompts
        return self.head(self.clip.images_differentiable(images)).squeeze(-1)
