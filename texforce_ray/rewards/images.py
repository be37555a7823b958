"""Image helpers of the rewards. Needs only numpy and Pillow."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000  # of one image: a small file can hold a very large one
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """uint8 [B, H, W, 3] to B images."""
    return [Image.fromarray(image) for image in images]


def enlarged(image: np.ndarray, shorter_side: int) -> np.ndarray:
    """Enlarge uint8 [H, W, 3], bicubic, so that its shorter side has at least that many pixels.

    Detectors are made for photographs: a 64 x 64 image has to be enlarged for them.
    """
    height, width = image.shape[:2]
    if min(height, width) >= shorter_side:
        return np.ascontiguousarray(image)
    factor = shorter_side / min(height, width)
    size = (round(width * factor), round(height * factor))
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def to_png(image: np.ndarray) -> str:
    """uint8 [H, W, 3] to a PNG file in base64: lossless, and text for JSON."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_png(text: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The inverse of `to_png`: uint8 [H, W, 3].

    Raises:
        ValueError: not a PNG file in base64, or one of more than `max_pixels` pixels.
    """
    data = io.BytesIO(base64.b64decode(text, validate=True))
    try:
        # Only PNG: Pillow passes some formats to other programs (EPS to Ghostscript).
        return _read(data, max_pixels, formats=("PNG",))
    except ValueError as error:
        raise ValueError(f"not a PNG image: {error}") from None


def read_image(path: Path) -> np.ndarray:
    """An image file as a viewer shows it on a white page: uint8 [H, W, 3].

    Rotated by its EXIF orientation, transparency over white, 16 bits scaled to 8; the first frame
    of an animation. Colour profiles are not applied.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        return _read(path, MAX_PIXELS)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read(
    source: Path | io.BytesIO, max_pixels: int, formats: tuple[str, ...] | None = None
) -> np.ndarray:
    try:
        with Image.open(source, formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"an image of {image.width} x {image.height} pixels is too large: at most "
                    f"{max_pixels:,} pixels are read; scale it down"
                )
            return _as_shown(ImageOps.exif_transpose(image), image.format)
    except Image.DecompressionBombError:
        raise ValueError(
            f"the image is too large: at most {max_pixels:,} pixels are read; scale it down"
        ) from None
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:  # from Pillow: not an image, or a bad chunk
        raise ValueError(f"not a readable image: {error}") from None


def _as_shown(image: Image.Image, kind: str | None) -> np.ndarray:
    """Any Pillow mode as uint8 [H, W, 3]; transparency is shown over white.

    Raises:
        ValueError: pixels whose range is unknown (32-bit integers and floats).
    """
    # Pillow reads 16-bit gray PNGs as 32-bit integers in its older versions.
    if image.mode in _SIXTEEN or (image.mode == "I" and kind in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.float64)
        gray = np.round(values / 257).clip(0, 255).astype(np.uint8)
        if isinstance(hidden := image.info.get("transparency"), int):
            gray[values == hidden] = 255
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels are 32-bit {'integers' if image.mode == 'I' else 'floats'}, whose black and "
            "white levels are unknown; convert the image to 8 or 16 bits"
        )
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
