"""Batches for pre-training, prepared in parallel by as many processes as there are spare cores.

Each item is a pure function of the recipe's seed and its index, so a resumed training sees the
same items.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer, T5Tokenizer

from texforce_ray.shapes import data
from texforce_ray.shapes.recipe import Recipe

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


class Captioned(Dataset[Any]):
    """Latents and a caption of each: what the batches of both kinds of denoiser have in common.

    `mean` and `std` (float32 [N, 4, 8, 8], scaled) are the VAE's posterior of each drawing.
    """

    def __init__(self, recipe: Recipe, latents: tuple[Tensor, Tensor]):
        self.recipe, self.batch = recipe, recipe.batch
        self.mean, self.std = latents
        self.captioners = [data.draw(2 * recipe.seed, i).caption for i in range(len(self.mean))]

    def __len__(self) -> int:
        return self.recipe.steps

    def drawn(self, step: int) -> tuple[list[str], Tensor, Tensor, torch.Generator]:
        """Captions, latents and unit noise of a step, and the generator for what else it draws."""
        rng = np.random.default_rng([self.recipe.seed, 1, step])
        torch_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = rng.integers(len(self.mean), size=self.batch)
        captions = [
            ""
            if rng.random() < self.recipe.caption_dropout
            else self.captioners[i](rng, bool(rng.random() < self.recipe.careful))
            for i in chosen
        ]
        rows = torch.from_numpy(chosen)
        mean, std = self.mean[rows], self.std[rows]
        x = mean + std * torch.randn(mean.shape, generator=torch_rng)
        return captions, x, torch.randn(x.shape, generator=torch_rng), torch_rng


class NoisyLatents(Captioned):
    """Batches for noise prediction: token ids [B, L], noisy latents, timesteps [B], the noise.

    `alphas` [T] are the schedule's cumulative products, `levels` [T] how often a timestep is
    trained.
    """

    def __init__(
        self,
        recipe: Recipe,
        latents: tuple[Tensor, Tensor],
        alphas: Tensor,
        levels: Tensor,
        tokenizer: CLIPTokenizer,
    ):
        super().__init__(recipe, latents)
        self.alphas, self.levels = alphas, levels
        self.ids = _remembered(tokenizer)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        captions, x, noise, torch_rng = self.drawn(step)
        ids = torch.tensor([self.ids(caption) for caption in captions])
        t = torch.multinomial(self.levels, self.batch, replacement=True, generator=torch_rng)
        alpha = self.alphas[t][:, None, None, None]
        return ids, alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t, noise


class FlowLatents(Captioned):
    """Batches for velocity prediction: ids for CLIP and T5, noisy latents, timesteps, velocity.

    Noise levels are logit-normal, as Stable Diffusion 3's (Esser et al. 2024, section 3.1), and
    shifted towards noise like its schedule.
    """

    def __init__(
        self,
        recipe: Recipe,
        latents: tuple[Tensor, Tensor],
        tokenizers: tuple[CLIPTokenizer, T5Tokenizer],
    ):
        super().__init__(recipe, latents)
        self.ids, self.t5_ids = map(_remembered, tokenizers)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        captions, x, noise, torch_rng = self.drawn(step)
        ids = torch.tensor([self.ids(caption) for caption in captions])
        t5_ids = torch.tensor([self.t5_ids(caption) for caption in captions])
        level = torch.randn(self.batch, generator=torch_rng).sigmoid()
        shift = self.recipe.shift
        level = shift * level / (1 + (shift - 1) * level)
        sigma = level[:, None, None, None]
        return ids, t5_ids, (1 - sigma) * x + sigma * noise, 1000 * level, noise - x


def _remembered(tokenizer: Any) -> Callable[[str], list[int]]:
    """Ids of a caption: there are only a few thousand, and tokenizing one takes a millisecond."""
    return lru_cache(maxsize=None)(
        lambda text: tokenizer(text, padding="max_length", truncation=True).input_ids
    )
