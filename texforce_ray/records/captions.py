"""Text inside images: wrapping, cutting and drawing with Pillow's built-in font."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from PIL import ImageDraw, ImageFont


def line_height(size: int) -> int:
    """Return the pixels from one line of text to the next."""
    return round(size * 1.3)


def text_width(text: str, size: int) -> float:
    """Return how wide `text` is drawn, in pixels."""
    return float(_font(size).getlength(_legible(text)))


def draw_lines(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    lines: Sequence[str],
    size: int,
    colour: tuple[int, int, int],
) -> None:
    """Draw `lines` below each other, the first one's upper left at `corner`."""
    for index, text in enumerate(lines):
        place = (corner[0], corner[1] + index * line_height(size))
        draw.text(place, _legible(text), font=_font(size), fill=colour)


def wrap(text: str, width: int, size: int, most: int) -> list[str]:
    """Break `text` into at most `most` lines of `width` pixels; "…" marks omitted text.

    A word that is wider than a line is split.
    """
    words = text.split() or [""]
    lines: list[str] = []
    while words and len(lines) < most:
        line = words.pop(0)
        while words and text_width(f"{line} {words[0]}", size) <= width:
            line = f"{line} {words.pop(0)}"
        cut = _fitting(line, width, size)
        if cut < len(line):
            words.insert(0, line[cut:])
        lines.append(line[:cut])
    if words:
        last = lines[-1]
        while last and text_width(f"{last}…", size) > width:
            last = last[:-1]
        lines[-1] = f"{last.rstrip()}…"
    return lines


def _fitting(line: str, width: int, size: int) -> int:
    cut = len(line)
    while cut > 1 and text_width(line[:cut], size) > width:
        cut -= 1
    return cut


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _legible(text: str) -> str:
    # The built-in font has no accented letters: "Ä" is drawn as "A" rather than as a box.
    if text.isascii():
        return text
    return "".join(
        part
        for letter in text
        for part in (letter if letter == "…" else unicodedata.normalize("NFKD", letter))
        if not unicodedata.combining(part)
    )
