"""The choices of pre-training, in a module of their own that needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Every choice that shapes the pre-trained weights."""

    seed: int = 0
    vae_steps: int = 3000
    vae_batch: int = 32
    vae_lr: float = 1.5e-3
    kl_weight: float = 1e-5
    drawings: int = 200_000
    steps: int = 24_000
    batch: int = 512
    lr: float = 1.5e-3
    warmup: int = 500
    ema_decay: float = 0.999
    careful: float = 0.5
    caption_dropout: float = 0.1
    most_weight: float = 20.0
    save_every: int = 1000
