"""Batches for pre-training, prepared in parallel by as many processes as there are spare cores.

Each item is a pure function of the recipe's seed and its index, so a resumed training sees the
same items.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from texforce_ray.shapes import data

_CORES_IN_USE = 2  # the training's own process and its drivers


def in_order(dataset: Dataset[Any], indices: Sequence[int]) -> Iterable[Any]:
    """The items of `indices`, in order, prepared ahead."""
    workers = max(0, (os.cpu_count() or 1) - _CORES_IN_USE)
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,  # captions and latents are shared
    )


class Pictures(Dataset[Tensor]):
    """Batches of drawings, float32 [B, 3, 64, 64] in [-1, 1]."""

    def __init__(
        self, seed: int, batch: int, total: int, weights: tuple[float, ...] = data.KIND_WEIGHTS
    ):
        self.seed, self.batch, self.total, self.weights = seed, batch, total, weights

    def __len__(self) -> int:
        return math.ceil(self.total / self.batch)

    def __getitem__(self, index: int) -> Tensor:
        first = index * self.batch
        drawings = range(first, min(first + self.batch, self.total))
        images = [data.draw(self.seed, i, self.weights).image for i in drawings]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels.contiguous()


class NoisyLatents(Dataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """Batches for noise prediction: token ids [B, L], noisy latents, timesteps [B], the noise.

    `mean` and `std` (float32 [N, 4, 8, 8], scaled) are the VAE's posterior of each drawing,
    `alphas` [T] the schedule's cumulative products, and `levels` [T] how often a timestep is
    trained.
    """

    def __init__(
        self,
        seed: int,
        batch: int,
        steps: int,
        latents: tuple[Tensor, Tensor],
        alphas: Tensor,
        levels: Tensor,
        tokenizer: CLIPTokenizer,
        *,
        careful: float,
        caption_dropout: float,
    ):
        self.seed, self.batch, self.steps = seed, batch, steps
        self.mean, self.std = latents
        self.alphas, self.levels = alphas, levels
        self.careful, self.caption_dropout = careful, caption_dropout
        self.captioners = [data.draw(2 * seed, i).caption for i in range(len(self.mean))]
        # There are only a few thousand captions; tokenizing one takes a millisecond.
        self.ids = lru_cache(maxsize=None)(
            lambda text: tokenizer(text, padding="max_length", truncation=True).input_ids
        )

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, 1, step])
        torch_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = rng.integers(len(self.mean), size=self.batch)
        captions = [
            ""
            if rng.random() < self.caption_dropout
            else self.captioners[i](rng, bool(rng.random() < self.careful))
            for i in chosen
        ]
        ids = torch.tensor([self.ids(caption) for caption in captions])
        rows = torch.from_numpy(chosen)
        mean, std = self.mean[rows], self.std[rows]
        x = mean + std * torch.randn(mean.shape, generator=torch_rng)
        noise = torch.randn(x.shape, generator=torch_rng)
        t = torch.multinomial(self.levels, self.batch, replacement=True, generator=torch_rng)
        alpha = self.alphas[t][:, None, None, None]
        return ids, alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t, noise
