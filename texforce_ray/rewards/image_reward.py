"""ImageReward v1.0 (Xu et al. 2023) through its own package, in whole batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from texforce_ray.rewards.images import to_pil
from texforce_ray.rewards.torch_models import (
    load_into,
    load_weights,
    pick_device,
    pick_dtype,
    weights_file,
)

_HUB = "THUDM/ImageReward"  # moved to zai-org; the hub forwards the old name


class ImageReward:
    """Human preference for an image given its prompt; mean 0, deviation 1 on real prompts."""

    def __init__(
        self,
        weights: str = f"{_HUB}:ImageReward.pt",
        med_config: str = f"{_HUB}:med_config.json",
        tokenizer: str = "bert-base-uncased",
        revision: str | None = None,
        cache_dir: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        from ImageReward.ImageReward import ImageReward as Model

        self.device = pick_device(device)
        config = str(weights_file(med_config, revision, cache_dir))
        with _tokenizer_from(tokenizer, cache_dir):
            self.model = Model(med_config=config, device=self.device)
        load_into(self.model, load_weights(weights_file(weights, revision, cache_dir)), weights)
        self.dtype = pick_dtype(dtype)
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Scores of uint8 [B, H, W, 3] in one forward pass, equal to the package's single ones."""
        del metadata
        model, blip = self.model, self.model.blip
        tokens = blip.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(self.device)
        pixels = torch.stack([model.preprocess(image) for image in to_pil(images)])
        seen = blip.visual_encoder(pixels.to(self.device, self.dtype))
        output = blip.text_encoder(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(
                seen.shape[:-1], dtype=torch.long, device=seen.device
            ),
            return_dict=True,
        )
        raw = model.mlp(output.last_hidden_state[:, 0, :]).float()
        return ((raw - model.mean) / model.std).squeeze(-1).tolist()


@contextlib.contextmanager
def _tokenizer_from(source: str, cache_dir: str | None) -> Iterator[None]:
    """Redirect the package's request to the hub for 'bert-base-uncased' to a path or cache."""
    from transformers import BertTokenizer

    real = BertTokenizer.from_pretrained

    def load(_: str, *arguments: Any, **options: Any) -> Any:
        return real(source, *arguments, cache_dir=cache_dir, **options)

    with mock.patch.object(BertTokenizer, "from_pretrained", load):
        yield
