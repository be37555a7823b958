"""Pre-training data of the shapes world: images, some of them degraded, and their captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from texforce_ray.shapes import captions, people, scene
from texforce_ray.shapes.captions import Captioner

# Hands and faces get less weight than the four abilities, as in web images.
KINDS = ("scene", "hand", "face")
KIND_WEIGHTS = (0.8, 0.1, 0.1)
# The VAE sees more of what is hard to compress: a face's eyes are half a latent cell wide.
VAE_KIND_WEIGHTS = (0.4, 0.15, 0.45)
# Two objects, each with its own colour, form and place, are hardest to learn.
ABILITY_WEIGHTS = (0.15, 0.2, 0.3, 0.35)
MALFORMED = 0.5  # share of malformed hands and faces, which plain captions do not mention
DEGRADED = 0.4  # share of scenes of poor appearance, which no caption mentions


@dataclass(frozen=True)
class Drawing:
    """One training image and `caption(rng, careful)`.

    Captions are requested many times, the image only once: it is drawn on first use.
    """

    caption: Captioner
    render: Callable[[], np.ndarray]

    @cached_property
    def image(self) -> np.ndarray:
        """uint8 [64, 64, 3]"""
        return self.render()


def draw(seed: int, index: int, weights: tuple[float, ...] = KIND_WEIGHTS) -> Drawing:
    """The `index`-th drawing of the world: a pure function of its arguments."""
    rng = np.random.default_rng([seed, index])
    kind = str(rng.choice(KINDS, p=weights))
    if kind == "scene":
        wanted = scene.random_scene(rng, ABILITY_WEIGHTS)
        return Drawing(captions.of_scene(wanted), lambda: _render_scene(wanted, rng))
    well_formed = bool(rng.random() >= MALFORMED)
    if kind == "hand":
        hand = people.random_hand(rng)
        return Drawing(
            captions.of_hand(hand, well_formed=well_formed),
            lambda: people.draw_hand(hand, rng, malformed=not well_formed),
        )
    face = people.random_face(rng)
    return Drawing(
        captions.of_face(face, well_formed=well_formed),
        lambda: people.draw_face(face, rng, malformed=not well_formed),
    )


def _render_scene(wanted: scene.Scene, rng: np.random.Generator) -> np.ndarray:
    image = scene.render(wanted, rng)
    return degrade(image, rng) if rng.random() < DEGRADED else image


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A drawing of poor appearance: blurred, washed out, on a blotched background.

    As strong as an 8 x 8 x 4 latent can represent, and weak enough not to matter to the `shapes`
    reward, which reads content. uint8 [64, 64, 3] to the same.
    """
    strength = rng.uniform(0.7, 1.0)
    pixels = image.astype(np.float32) / 255
    background = np.median(pixels[0], axis=0)
    pixels = ndimage.gaussian_filter(pixels, (1.3 * strength, 1.3 * strength, 0))
    pixels += 0.10 * strength * (background - pixels)
    blotches = ndimage.gaussian_filter(rng.standard_normal(image.shape[:2]), 5, mode="wrap")
    dirt = np.clip(blotches / blotches.std(), 0, 1.4)[..., None]
    pixels -= 0.06 * strength * dirt * np.array([0.8, 1.0, 1.5], dtype=np.float32)
    return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)
