"""Images that people have: read as a viewer would show them, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from texforce_ray.rewards.images import read_image


def _saved(image: Image.Image, path: Path, **options: Any) -> np.ndarray:
    image.save(path, **options)
    return read_image(path)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    gray = np.arange(256, dtype=np.uint16)[None] * 257
    shown = _saved(Image.fromarray(gray), tmp_path / f"gray.{kind}")
    assert (shown == np.arange(256)[None, :, None]).all()


def test_what_is_transparent_is_shown_over_white(tmp_path: Path) -> None:
    """One visible picture has one score, however it was saved."""
    shown = np.full((4, 4, 3), 255, np.uint8)
    shown[:2] = (200, 30, 90)
    rgba = np.concatenate([shown, np.full((4, 4, 1), 255, np.uint8)], axis=2)
    rgba[2:] = 0  # black, and invisible
    palette = Image.fromarray(shown).quantize(4, dither=Image.Dither.NONE)
    clear = palette.getpixel((0, 3))
    for name, image, options in (
        ("plain", Image.fromarray(shown), {}),
        ("alpha", Image.fromarray(rgba), {}),
        ("palette", palette, {"transparency": clear}),
        ("key", Image.fromarray(rgba[..., :3]), {"transparency": (0, 0, 0)}),
    ):
        assert np.array_equal(_saved(image, tmp_path / f"{name}.png", **options), shown), name
    half = Image.new("LA", (2, 2), (0, 128))
    assert (_saved(half, tmp_path / "half.png") == 127).all()


def test_other_modes_are_shown_as_a_viewer_would(tmp_path: Path) -> None:
    photo = np.zeros((16, 32, 3), np.uint8)
    photo[:, :16] = (250, 10, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right by a viewer
    turned = _saved(Image.fromarray(photo), tmp_path / "turned.jpg", exif=exif, quality=95)
    assert turned.shape == (32, 16, 3)
    assert turned[:14].mean(axis=(0, 1)) == pytest.approx([250, 10, 10], abs=8)
    cmyk = _saved(Image.fromarray(photo).convert("CMYK"), tmp_path / "cmyk.jpg", quality=95)
    assert cmyk[:, :14].mean(axis=(0, 1)) == pytest.approx([250, 10, 10], abs=8)
    bits = Image.fromarray(photo[..., 0] > 100)
    assert (_saved(bits, tmp_path / "bits.png")[0, [0, 31]] == [[255] * 3, [0] * 3]).all()


@pytest.mark.parametrize(("width", "height"), [(20_000, 10_000), (10_000, 10_000)])
def test_a_huge_image_is_refused_by_name(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (width, height)).save(path)
    with pytest.raises(ValueError, match=r"huge\.png: .*too large: at most 64,000,000 pixels"):
        read_image(path)


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("hello")
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "floats.tiff")
    for name, said in (("words.png", "not a readable image"), ("floats.tiff", "32-bit floats")):
        with pytest.raises(ValueError, match=rf"{name}: .*{said}"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"missing\.png: no such file"):
        read_image(tmp_path / "missing.png")
