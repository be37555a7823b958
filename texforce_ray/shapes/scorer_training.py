"""Trains the differentiable scorer on rendered scenes.

Each drawing passes through the pipeline's VAE with some noise on its latents, so that it looks like
the U-Net's images; the detector scores its match with the true prompt, with prompts whose
attributes are swapped, and with others. On one kind of machine, all is a function of `--seed`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from texforce_ray.shapes import detector, scene
from texforce_ray.shapes.captions import with_swaps
from texforce_ray.shapes.scorer import Scorer, describe

_PROMPTS = 6  # scored for each drawing
_VAE = Path(__file__).parent / "weights" / "vae"


def prompts_for(drawn: scene.Scene, rng: np.random.Generator) -> list[scene.Scene]:
    """The drawing's own scene, variants with attributes swapped, and random ones."""
    swapped = [with_swaps(drawn, rng, swap) for swap in (0.2, 0.4, 0.6)]
    return [drawn, *swapped, *(scene.random_scene(rng) for _ in range(_PROMPTS - 4))]


def crowd(rng: np.random.Generator) -> scene.Scene:
    """A scene to draw; sometimes one that no prompt asks for: two kinds with several copies."""
    drawn = scene.random_scene(rng)
    if len(drawn.items) == 2 and rng.random() < 0.25:
        return replace(drawn, count=2, relation=None)
    return drawn


@torch.no_grad()
def examples(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [N, 3, 64, 64], float32 [N, P, SCENE_WIDTH] and [N, P] scores."""
    vae = AutoencoderKL.from_pretrained(_VAE, torch_dtype=torch.float32).eval()
    images, scenes, scores = [], [], []
    for first in tqdm(range(0, count, 64), desc="drawings", mininterval=5):
        rng = np.random.default_rng([seed, first])
        drawn = [crowd(rng) for _ in range(64)]
        pixels = np.stack([scene.render(s, rng) for s in drawn])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = vae.encode(x).latent_dist.mean
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        level = torch.from_numpy(rng.choice([0.0, 0.15, 0.3, 0.5], size=64).astype(np.float32))
        latents = latents + noise * level[:, None, None, None] * latents.std()
        decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).mul(255).round()
        decoded = decoded.to(torch.uint8)
        images.append(decoded)
        for picture, shown in zip(decoded.permute(0, 2, 3, 1).numpy(), drawn, strict=True):
            base = shown if shown.count == 1 or len(shown.items) == 1 else replace(shown, count=1)
            asked = prompts_for(base, rng)
            scenes.append([describe(s) for s in asked])
            found = detector.detect(picture)
            scores.append([detector.match(found, s) for s in asked])
    return torch.cat(images), torch.tensor(scenes), torch.tensor(scores)


def train(seed: int, drawings: int, steps: int, batch: int, lr: float) -> Scorer:
    """Regression on the detector's scores; cosine schedule."""
    images, scenes, scores = examples(seed, drawings)
    torch.manual_seed(seed)
    scorer = Scorer()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    rng = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc="scorer", mininterval=5)
    for step in bar:
        rows = torch.randint(0, len(images), (batch,), generator=rng)
        columns = torch.randint(0, scores.shape[1], (batch,), generator=rng)
        x = images[rows].float() / 255
        predicted = scorer(x, scenes[rows, columns])
        loss = (predicted - scores[rows, columns]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(rmse=f"{loss.item() ** 0.5:.3f}", refresh=False)
    return scorer.eval()


@torch.no_grad()
def agreement(scorer: Scorer, seed: int, drawings: int) -> tuple[float, float]:
    """Root mean square error and correlation with the detector on other drawings."""
    images, scenes, scores = examples(seed, drawings)
    rows = torch.arange(len(images)).repeat_interleave(scores.shape[1])
    parts = zip(rows.split(256), scenes.flatten(0, 1).split(256), strict=True)
    predicted = torch.cat([scorer(images[r].float() / 255, s) for r, s in parts])
    wanted = scores.flatten()
    correlation = torch.corrcoef(torch.stack([predicted, wanted]))[0, 1]
    return float((predicted - wanted).square().mean().sqrt()), float(correlation)


def train_and_write(
    out: Path, seed: int, drawings: int, steps: int, batch: int, lr: float
) -> tuple[float, float]:
    """Train a scorer into a safetensors file; its error and correlation on other drawings."""
    scorer = train(seed, drawings, steps, batch, lr)
    weights = {name: value.half().contiguous() for name, value in scorer.state_dict().items()}
    save_file(weights, out)
    return agreement(scorer, seed + 1, 1024)
