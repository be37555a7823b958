"""Drift sees what moved; style drift sees how an image is made."""

from __future__ import annotations

import numpy as np
import pytest

from texforce_ray.records.looks import Looks
from texforce_ray.shapes import data
from texforce_ray.shapes.scene import parse, render


def _drawn(prompt: str, seed: int, count: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([render(parse(prompt), rng) for _ in range(count)])


def test_what_moved_is_drift_and_no_change_of_style() -> None:
    images = _drawn("two red squares", 0)
    moved = np.roll(images, (13, 7), axis=(1, 2))
    base, other = Looks.of(images), Looks.of(moved)
    assert other.drift(base) > 0.1
    assert other.style_drift(base) < 0.005


def test_blurred_and_washed_images_have_another_style() -> None:
    images, rng = _drawn("two red squares", 0), np.random.default_rng(1)
    degraded = np.stack([data.degrade(image, rng) for image in images])
    base, poor = Looks.of(images), Looks.of(degraded)
    again = Looks.of(_drawn("two red squares", 5))
    # Against other images of the same prompt, of other sizes elsewhere: the order turns round.
    assert poor.style_drift(base) > again.style_drift(base)
    assert poor.drift(base) < 0.5 * again.drift(base)


def test_parts_are_joined_and_diversity_falls_when_a_policy_collapses() -> None:
    images = _drawn("a green circle", 0, 8)
    parts = Looks.joined([Looks.of(images[:3]), Looks.of(images[3:])])
    assert parts.drift(Looks.of(images)) == parts.style_drift(Looks.of(images)) == 0
    collapsed = Looks.of(np.repeat(images[:1], 8, axis=0))
    assert collapsed.diversity(["x"] * 8) == 0 < parts.diversity(["x"] * 8)
    assert np.isnan(parts.diversity([str(i) for i in range(8)]))


@pytest.mark.parametrize("size", [(24, 40), (512, 512)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    looks = Looks.of(images)
    assert looks.thumbnails.shape == (2, 16, 16, 3)
    assert looks.styles.shape == (2, 160)
