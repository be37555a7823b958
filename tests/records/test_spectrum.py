"""Grids and noise that a policy adds are measured; what an image shows is not taken for them."""

from __future__ import annotations

import time

import numpy as np
import pytest

from texforce_ray.observability.alarms import LearningAlarms
from texforce_ray.records.looks import Looks
from texforce_ray.records.spectrum import artefacts
from texforce_ray.shapes import data
from texforce_ray.shapes.scene import parse, render

PROMPTS = (
    "three red squares", "a green circle", "four black squares", "a red triangle and a blue square",
    "a green triangle above a yellow circle",
)  # fmt: skip
NAMES = ("high_frequency", "grid")


def _drawings(size: int = 64, each: int = 6) -> list[np.ndarray]:
    """Clean drawings; larger ones are made of several, so that their edges stay sharp."""
    rng = np.random.default_rng(0)
    drawn = [render(parse(prompt), rng) for prompt in PROMPTS for _ in range(each)]
    if size == 64:
        return drawn
    cells = size // 64
    pick = rng.integers(len(drawn), size=(4, cells, cells))
    return [np.block([[[drawn[i]] for i in row] for row in choice]) for choice in pick]


def _added(image: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """`pattern`: luminance, float [H, W]."""
    return np.clip(np.rint(image + 255 * pattern[..., None]), 0, 255).astype(np.uint8)


def _checkerboard(size: int, side: int = 1) -> np.ndarray:
    y, x = np.mgrid[:size, :size] // side
    return 1.0 - 2 * ((y + x) % 2)


def _blocks(size: int) -> np.ndarray:
    """The outlines of 8 x 8 blocks, as JPEG and decoders of latents leave them."""
    y, x = np.mgrid[:size, :size] % 8
    return -1.0 * ((y == 0) | (x == 0))


def _means(images: list[np.ndarray]) -> dict[str, float]:
    return dict(zip(NAMES, np.mean([artefacts(image) for image in images], axis=0), strict=True))


def _warned(base: list[np.ndarray], tuned: list[np.ndarray]) -> set[str]:
    """Which of the two is reported, when a run's images turn from `base` into `tuned`."""
    before, after = _means(base), _means(tuned)
    line: dict = {f"eval/{name}": value for name, value in after.items()}
    line |= {f"eval/base_{name}": value for name, value in before.items()}
    found = LearningAlarms().look({"iteration": 3, **line})
    return {name for name in NAMES if any(f"eval/{name} is" in text for text in found)}


@pytest.mark.parametrize("size", [64, 256])
def test_clean_drawings_have_no_grid_and_few_high_frequencies(size: int) -> None:
    found = np.array([artefacts(image) for image in _drawings(size)])
    assert found[:, 0].max() < 0.06
    assert found[:, 1].max() < 0.002


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("side", [1, 2, 4])
def test_a_faint_checkerboard_is_measured_by_its_contrast(size: int, side: int) -> None:
    images = _drawings(size)
    board = 0.04 * _checkerboard(size, side)
    marred = [_added(image, board) for image in images]
    # Of a square wave, its harmonics count too as far as they stand out.
    assert 0.025 < _means(marred)["grid"] < 0.042
    assert "grid" in _warned(images, marred)


@pytest.mark.parametrize("size", [64, 256])
def test_a_grid_of_eight_pixels_is_reported(size: int) -> None:
    images = _drawings(size)
    assert "grid" in _warned(images, [_added(image, 0.08 * _blocks(size)) for image in images])


@pytest.mark.parametrize("size", [64, 256])
def test_noise_is_high_frequency_and_no_grid(size: int) -> None:
    images, rng = _drawings(size), np.random.default_rng(1)
    marred = [_added(image, rng.normal(0, 0.08, image.shape[:2])) for image in images]
    assert _warned(images, marred) == {"high_frequency"}


def test_other_and_sharper_drawings_are_not_reported() -> None:
    rng = np.random.default_rng(2)
    clean = _drawings()
    poor = [data.degrade(image, rng) for image in clean]
    assert _warned(poor, clean) == set()  # as a policy that learns to draw well
    assert _warned(clean, poor) == set()
    assert _warned(clean[:12], clean[12:]) == set()  # other prompts


def test_a_plain_image_has_neither() -> None:
    """Though all it has is rounding: of that, high frequencies are a large share."""
    ramp = np.linspace(0, 1, 64)
    for light in (np.zeros((64, 64)), np.ones((64, 64)), np.add.outer(ramp, ramp) / 2):
        image = np.rint(255 * light)[..., None].repeat(3, axis=-1).astype(np.uint8)
        assert max(artefacts(image)) < 0.002
    rng = np.random.default_rng(3)
    image = rng.integers(127, 130, (64, 64, 1)).repeat(3, axis=-1).astype(np.uint8)
    assert artefacts(image)[0] < 0.05


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (24, 40), (65, 64), (100, 700)])
def test_any_size_is_measured(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    high_frequency, grid = artefacts(image)
    assert 0 <= high_frequency <= 1
    assert 0 <= grid < 0.2


def test_large_images_take_milliseconds() -> None:
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    seconds = []
    for _ in range(5):
        began = time.process_time()
        artefacts(image)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.2  # 25 ms on one core


def test_looks_hold_them_for_each_image() -> None:
    images = np.stack(_drawings()[:4])
    images[2] = _added(images[2], 0.1 * _checkerboard(64))
    looks = Looks.joined([Looks.of(images[:1]), Looks.of(images[1:])])
    assert looks.artefacts.shape == (4, 2)
    assert looks.artefacts[:, 1].argmax() == 2
    assert looks.artefact_means() == _means(list(images))
