"""The choices of pre-training, in a module of their own that needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Every choice that shapes the pre-trained weights.

    family: 'ddim' or 'flow'; a flow pipeline takes the VAE and the first text encoder of the
    embedded DDIM pipeline. shift: towards noise, of a flow's training levels.
    """

    family: str = "ddim"
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
    shift: float = 1.5
    save_every: int = 1000


RECIPES = {
    "ddim": Recipe(),
    "flow": Recipe(
        family="flow",
        drawings=64_000,
        steps=9_000,
        batch=128,
        lr=1e-3,
        warmup=300,
        save_every=250,
    ),
}
