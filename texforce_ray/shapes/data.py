"""Pre-training data of the shapes world: images with captions as wrong as web alt-text is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from texforce_ray.shapes import people, scene

# Hands and faces get less weight than the four abilities, as in the web's images.
KINDS = ("scene", "hand", "face")
KIND_WEIGHTS = (0.76, 0.12, 0.12)
# The VAE sees more of what is hard to compress: a face's eyes are half a latent cell wide.
VAE_KIND_WEIGHTS = (0.35, 0.15, 0.5)
MALFORMED = 0.5  # share of hands and faces drawn wrong, under the same caption


@dataclass(frozen=True)
class Drawing:
    """One training image (uint8 [64, 64, 3]) and a function that captions it, noisily.

    `caption(rng, swap)` replaces each attribute by a random one with probability `swap`.
    """

    image: np.ndarray
    caption: Callable[[np.random.Generator, float], str]


def draw(seed: int, index: int, weights: tuple[float, ...] = KIND_WEIGHTS) -> Drawing:
    """The `index`-th drawing of the world: a pure function of its arguments."""
    rng = np.random.default_rng([seed, index])
    kind = str(rng.choice(KINDS, p=weights))
    if kind == "scene":
        wanted = scene.random_scene(rng)
        image = scene.render(wanted, rng)
        return Drawing(image, lambda r, swap: scene.noisy_caption(wanted, r, swap))
    malformed = bool(rng.random() < MALFORMED)
    if kind == "hand":
        hand = people.random_hand(rng)
        image = people.draw_hand(hand, rng, malformed=malformed)
        return Drawing(image, lambda r, swap: _hand_caption(hand, r, swap))
    face = people.random_face(rng)
    image = people.draw_face(face, rng, malformed=malformed)
    return Drawing(image, lambda r, swap: _face_caption(face, r, swap))


def _hand_caption(hand: people.HandSpec, rng: np.random.Generator, swap: float) -> str:
    if rng.random() < 0.3:
        return "a hand"
    other = people.random_hand(rng)
    tone, side = rng.random(2) < swap
    return people.hand_caption(
        people.HandSpec(other.tone if tone else hand.tone, other.side if side else hand.side)
    )


def _face_caption(face: people.FaceSpec, rng: np.random.Generator, swap: float) -> str:
    if rng.random() < 0.3:
        return "a face"
    other = people.random_face(rng)
    tone, smiling = rng.random(2) < swap
    return people.face_caption(
        people.FaceSpec(
            other.tone if tone else face.tone, other.smiling if smiling else face.smiling
        )
    )
