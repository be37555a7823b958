"""Captioned image grids, drawn with Pillow alone."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from texforce_ray.files import atomic_write_bytes
from texforce_ray.records.captions import draw_lines, line_height, text_width, wrap

Pixels = NDArray[np.uint8]

_GAP = 8
_CELL = 160  # pixels; small images are enlarged to about this
_CELL_MAX = 256  # pixels; large images are reduced to this
_TITLE_LINES = 3
_INK, _MUTED, _BEST = (28, 31, 36), (106, 112, 122), (17, 122, 61)
_TEXT, _HEADER = 13, 17


def grid(
    images: Pixels,
    columns: int,
    *,
    titles: Sequence[str] | None = None,
    scale: int = 1,
    header: str | None = None,
) -> Pixels:
    """Lay images out in rows, each over its title.

    Args:
        images: uint8 `[N,H,W,3]`, N >= 1. Small ones are enlarged to about 160 pixels by an
            integer factor, without interpolation; those above 256 are reduced to 256.
        columns: images in a row.
        titles: one per image; wrapped to the image's width, at most three lines.
        scale: multiplies the size of the images.
        header: a line above the whole grid.

    Returns:
        uint8 `[H',W',3]`, on white.

    Raises:
        ValueError: wrong shape or dtype, or not one title per image.
    """
    cells = _cells(images, scale)
    if titles is not None and len(titles) != len(cells):
        raise ValueError(f"grid needs one title per image, got {len(titles)} for {len(cells)}")
    columns = max(1, min(columns, len(cells)))
    width, height = cells[0].size
    captions = [wrap(title, width, _TEXT, _TITLE_LINES) for title in titles or ()]
    line = line_height(_TEXT)
    row_height = height + _GAP + line * max(map(len, captions), default=0)
    rows = math.ceil(len(cells) / columns)
    total = columns * (width + _GAP) + _GAP
    heading = [] if header is None else wrap(header, total - 2 * _GAP, _HEADER, 2)
    top = _GAP + (len(heading) * line_height(_HEADER) + 4 if heading else 0)
    canvas = Image.new("RGB", (total, top + rows * row_height + (2 if captions else 0)), "white")
    draw = ImageDraw.Draw(canvas)
    draw_lines(draw, (_GAP, _GAP - 2), heading, _HEADER, _INK)
    for index, cell in enumerate(cells):
        x = _GAP + index % columns * (width + _GAP)
        y = top + index // columns * row_height
        canvas.paste(cell, (x, y))
        if captions:
            draw_lines(draw, (x, y + height + 2), captions[index], _TEXT, _INK)
    return np.asarray(canvas)


def comparison(
    rows: Sequence[tuple[str, Pixels]],
    titles: Sequence[str],
    *,
    scores: Sequence[Sequence[float]] | None = None,
    columns: int = 8,
    scale: int = 1,
    header: str | None = None,
) -> Pixels:
    """Draw one row per policy and one column per prompt, so that a column compares policies.

    Args:
        rows: name and images (uint8 `[N,H,W,3]`) of each policy, e.g. "base" and "tuned".
        titles: the N prompts, above the columns.
        scores: per policy the N scores, shown under the images, the best of a column in green.
        columns: prompts side by side; more go into further blocks below.
        scale: multiplies the size of the images.
        header: a line above the whole picture.

    Returns:
        uint8 `[H',W',3]`, on white.

    Raises:
        ValueError: the numbers of images, titles and scores differ.
    """
    counts = [len(titles), *(len(images) for _, images in rows), *map(len, scores or ())]
    if not rows or len(set(counts)) != 1 or (scores is not None and len(scores) != len(rows)):
        raise ValueError(f"comparison needs one image, title and score per prompt, got {counts}")
    cells = [_cells(images, scale) for _, images in rows]
    names = [name for name, _ in rows]
    columns = max(1, min(columns, len(titles)))
    margin = math.ceil(max(text_width(name, _HEADER) for name in names)) + 2 * _GAP
    total = margin + columns * (cells[0][0].width + _GAP)
    blocks = []
    if header is not None:
        lines = wrap(header, total - 2 * _GAP, _HEADER, 2)
        strip = Image.new("RGB", (total, len(lines) * line_height(_HEADER) + _GAP), "white")
        draw_lines(ImageDraw.Draw(strip), (_GAP, _GAP), lines, _HEADER, _INK)
        blocks.append(np.asarray(strip))
    for start in range(0, len(titles), columns):
        part = slice(start, start + columns)
        block_scores = None if scores is None else [list(row[part]) for row in scores]
        block_cells = [row[part] for row in cells]
        block = _block(names, block_cells, titles[part], block_scores, margin=margin, total=total)
        blocks.append(block)
    return np.concatenate(blocks)


def save_png(path: Path, image: Pixels) -> None:
    """Write `image` (uint8 `[H,W,3]`) as PNG, atomically.

    Raises:
        RunDirectoryError: the file could not be written.
    """
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format="PNG", optimize=True)
    atomic_write_bytes(path, encoded.getvalue())


def _block(
    names: Sequence[str],
    cells: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    scores: Sequence[Sequence[float]] | None,
    *,
    margin: int,
    total: int,
) -> Pixels:
    width, height = cells[0][0].size
    line = line_height(_TEXT)
    captions = [wrap(title, width, _TEXT, _TITLE_LINES) for title in titles]
    top = _GAP + line * max(map(len, captions)) + 4
    row_height = height + _GAP + (line if scores is not None else 0)
    canvas = Image.new("RGB", (total, top + row_height * len(names) + 2), "white")
    draw = ImageDraw.Draw(canvas)
    for column, caption in enumerate(captions):
        x = margin + column * (width + _GAP)
        # Bottom-aligned: a short title stays with its image.
        y = top - 4 - line * len(caption)
        draw_lines(draw, (x, y), caption, _TEXT, _INK)
        shown = [_rounded(row[column]) for row in scores or ()]
        best = max((s for s in shown if not math.isnan(s)), default=math.nan)
        distinct = len(set(shown)) > 1
        for row, policy in enumerate(cells):
            corner = top + row * row_height
            canvas.paste(policy[column], (x, corner))
            if shown:
                text = "no score" if math.isnan(shown[row]) else f"{shown[row]:.3f}"
                colour = _BEST if distinct and shown[row] == best else _MUTED
                draw_lines(draw, (x, corner + height + 2), [text], _TEXT, colour)
    for row, name in enumerate(names):
        y = top + row * row_height + (height - line_height(_HEADER)) // 2
        draw_lines(draw, (_GAP, y), [name], _HEADER, _INK)
    return np.asarray(canvas)


def _rounded(score: float) -> float:
    return round(float(score), 3)  # compared as shown: 0.5001 does not beat 0.5000


def _cells(images: Pixels, scale: int) -> list[Image.Image]:
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(
            f"images must be uint8 [N,H,W,3] with N >= 1, got {images.dtype} {list(images.shape)}"
        )
    height, width = images.shape[1:3]
    longest = max(height, width)
    if longest > _CELL_MAX:
        factor, how = scale * _CELL_MAX / longest, Image.Resampling.LANCZOS
    else:
        factor, how = scale * max(1.0, round(_CELL / longest)), Image.Resampling.NEAREST
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return [Image.fromarray(image).resize(size, how) for image in images]
