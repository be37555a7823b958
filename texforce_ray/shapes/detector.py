"""Reads a generated image: finds coloured forms and scores how well they match a scene.

The score has a slope: a half-right image gets about half the score, so that reinforcement
learning has something to climb. Nothing but the image's pixels and the prompt's text is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage, optimize

from texforce_ray.shapes.scene import COLORS, FORMS, RELATIONS, Scene, _draw_form

PALETTE = np.array(list(COLORS.values()), dtype=np.float32) / 255
_NAMES = tuple(COLORS)
_MIN_AREA = 28  # pixels; the smallest true form (a triangle of radius 7.5) covers about 100
FOREGROUND = 0.22  # RGB distance from the background colour, channels in [0, 1]
_TEMPLATE = 32


@dataclass(frozen=True)
class Found:
    """One object seen in an image: centre (x, y) in pixels, membership of each colour and form."""

    x: float
    y: float
    area: int
    colors: dict[str, float]
    forms: dict[str, float]


@lru_cache(maxsize=1)
def _templates() -> dict[str, np.ndarray]:
    """Each form's mask cropped to its bounding box and scaled to 32 x 32: bool."""
    from PIL import ImageDraw

    masks = {}
    for form in FORMS:
        image = Image.new("L", (512, 512))
        _draw_form(ImageDraw.Draw(image), form, 256, 256, 200, (255,))
        masks[form] = _to_box(np.asarray(image) > 127)
    return masks


def _to_box(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scaled = Image.fromarray(crop.astype(np.uint8) * 255).resize(
        (_TEMPLATE, _TEMPLATE), Image.Resampling.BILINEAR
    )
    return np.asarray(scaled) > 127


def background_of(pixels: np.ndarray) -> np.ndarray:
    """The rim's median colour, [3], of [H, W, 3]."""
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(rim, axis=0)


def detect(image: np.ndarray) -> list[Found]:
    """Objects in one image (uint8 [H, W, 3]), largest first.

    Foreground is what differs from the rim's median colour. It is split by nearest palette
    colour, so that a form painted in two colours counts as two, each of a doubtful form.
    """
    pixels = image.astype(np.float32) / 255
    foreground = np.linalg.norm(pixels - background_of(pixels), axis=-1) > FOREGROUND
    nearest = np.linalg.norm(pixels[:, :, None] - PALETTE, axis=-1).argmin(-1)
    found = []
    for index in range(len(PALETTE)):
        mask = foreground & (nearest == index)
        if np.count_nonzero(mask) < _MIN_AREA:
            continue
        # Opening drops the thin rims where two colours blend; a form's corners are grown back.
        labels, _ = ndimage.label(_dilated(_eroded(mask)))
        for label, box in enumerate(ndimage.find_objects(labels), 1):
            around = tuple(slice(max(0, part.start - 3), part.stop + 3) for part in box)
            part, inside = labels[around] == label, mask[around]
            for _ in range(2):
                part = _dilated(part) & inside
            if (area := int(np.count_nonzero(part))) >= _MIN_AREA:
                corner = around[0].start, around[1].start
                filled = ndimage.binary_fill_holes(_padded(part))[1:-1, 1:-1]
                found.append(_describe(pixels[around], filled, part, corner, area))
    return sorted(found, key=lambda f: -f.area)


def _padded(mask: np.ndarray) -> np.ndarray:
    """With a rim of False; `np.pad` takes ten times as long."""
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), dtype=bool)
    padded[1:-1, 1:-1] = mask
    return padded


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Erosion of a bool [H, W] by a 3 x 3 square; outside is False."""
    padded = _padded(mask)
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    return rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]


def _dilated(mask: np.ndarray) -> np.ndarray:
    """Dilation of a bool [H, W] by a 3 x 3 square."""
    padded = _padded(mask)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _describe(
    pixels: np.ndarray, filled: np.ndarray, part: np.ndarray, corner: tuple[int, int], area: int
) -> Found:
    """The object that covers `part` of some pixels, whose first one is at `corner` (y, x)."""
    rows, columns = np.nonzero(filled)
    count = len(rows)
    y, x = (rows.sum() + count * corner[0]) / count, (columns.sum() + count * corner[1]) / count
    distance = np.linalg.norm(np.median(pixels[part], axis=0) - PALETTE, axis=-1)
    colors = np.clip(1 - (distance - 0.16) / 0.4, 0, 1)
    box = _to_box(filled)
    overlap = {
        form: np.count_nonzero(box & mask) / np.count_nonzero(box | mask)
        for form, mask in _templates().items()
    }
    forms = {}
    for form, iou in overlap.items():
        rival = max(other for name, other in overlap.items() if name != form)
        # Half where two forms fit equally well; full from a clear lead and a clean outline.
        lead = min(max(0.5 + (iou - rival) / 0.12, 0.0), 1.0)
        forms[form] = lead * min(max((iou - 0.4) / 0.4, 0.0), 1.0)
    named = {name: float(value) for name, value in zip(_NAMES, colors, strict=True)}
    return Found(float(x), float(y), area, named, forms)


def score(image: np.ndarray, scene: Scene) -> float:
    """How well one image (uint8 [H, W, 3]) shows `scene`, in [0, 1].

    Objects wanted and found are paired one to one for the best total quality; the total is
    divided by the larger of the two numbers, so that missing and surplus objects cost the same.
    In a location scene, 40 % of the score is the relative position of the paired objects.
    """
    return match(detect(image), scene)


def match(found: list[Found], scene: Scene) -> float:
    """As `score`, for what `detect` found in an image."""
    if not found:
        return 0.0
    wanted = scene.objects
    quality = np.array([[_quality(f, w.color, w.form) for f in found] for w in wanted])
    rows, columns = optimize.linear_sum_assignment(-quality)
    total = float(quality[rows, columns].sum()) / max(len(found), len(wanted))
    if scene.relation is None:
        return total
    relation = 0.0
    if len(rows) == 2:
        first, second = (found[c] for c in columns)
        axis = RELATIONS[scene.relation]
        along = (first.x - second.x) * axis[0] + (first.y - second.y) * axis[1]
        across = abs((first.x - second.x) * axis[1]) + abs((first.y - second.y) * axis[0])
        relation = float(np.clip(0.5 + (along - 0.5 * across) / 16, 0, 1))
    return total * (0.6 + 0.4 * relation)


def _quality(found: Found, color: str, form: str) -> float:
    c, f = found.colors[color], found.forms[form]
    return 0.25 * c + 0.25 * f + 0.5 * c * f
