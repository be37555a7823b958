"""The shapes world: scenes of coloured forms, and their true renderings.

Four abilities, those of the paper's Fig. 5: colour ("a green circle"), count ("three red
squares"), composition ("a red circle and a blue square") and location ("a green triangle above a
yellow circle"). Needs only numpy and Pillow, so that reward environments can import it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
SUPERSAMPLE = 4

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 40),
    "yellow": (242, 208, 30),
    "green": (36, 160, 62),
    "blue": (44, 92, 226),
    "purple": (158, 48, 190),
    "black": (28, 28, 32),
}
FORMS = ("circle", "square", "triangle")
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {
    "above": (0, -1),
    "below": (0, 1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
}
ABILITIES = ("color", "count", "composition", "location")


@dataclass(frozen=True)
class Item:
    """One form of one colour."""

    color: str
    form: str

    @property
    def held_out(self) -> bool:
        """Whether prompts with this pair are kept for evaluation (the paper's unseen prompts).

        Every third pair along the diagonal: each colour and each form is still seen in training.
        """
        pair = (list(COLORS).index(self.color) + FORMS.index(self.form)) % len(FORMS)
        return pair == 0 and self.color != "black"


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: `count` copies of a single item, or two items, maybe related."""

    items: tuple[Item, ...]
    count: int = 1
    relation: str | None = None

    @property
    def objects(self) -> tuple[Item, ...]:
        """Every object that has to be in the image, copies included."""
        return self.items * self.count

    @property
    def ability(self) -> str:
        if self.relation:
            return "location"
        if len(self.items) == 2:
            return "composition"
        return "count" if self.count > 1 else "color"

    @property
    def held_out(self) -> bool:
        return any(item.held_out for item in self.items)

    @property
    def caption(self) -> str:
        if self.count > 1:
            item = self.items[0]
            return f"{COUNTS[self.count]} {item.color} {item.form}s"
        named = [f"a {item.color} {item.form}" for item in self.items]
        return f" {self.relation or 'and'} ".join(named)


_COLOR = "|".join(COLORS)
_FORM = "|".join(FORMS)
_COUNT_OF = {word: count for count, word in COUNTS.items()}
_ONE = re.compile(rf"an? ({_COLOR}) ({_FORM})")
_MANY = re.compile(rf"({'|'.join(_COUNT_OF)}) ({_COLOR}) ({_FORM})s")
_TWO = re.compile(rf"an? ({_COLOR}) ({_FORM}) ({'|'.join(RELATIONS)}|and) an? ({_COLOR}) ({_FORM})")


def parse(prompt: str) -> Scene:
    """Read a prompt of the shapes world back into its scene.

    Raises:
        ValueError: the prompt does not describe such a scene.
    """
    text = " ".join(prompt.lower().strip(" .").split())
    if match := _MANY.fullmatch(text):
        return Scene((Item(match[2], match[3]),), count=_COUNT_OF[match[1]])
    if match := _ONE.fullmatch(text):
        return Scene((Item(match[1], match[2]),))
    if match := _TWO.fullmatch(text):
        relation = None if match[3] == "and" else match[3]
        return Scene((Item(match[1], match[2]), Item(match[4], match[5])), relation=relation)
    raise ValueError(
        f"{prompt!r} is not a prompt of the shapes world; write it like 'a green circle', "
        "'three red squares', 'a red circle and a blue square' or "
        "'a green triangle above a yellow circle'"
    )


def all_scenes(ability: str) -> list[Scene]:
    """Every scene of one ability, in a fixed order; two items never share colour or form."""
    items = [Item(color, form) for color, form in product(COLORS, FORMS)]
    if ability == "color":
        return [Scene((item,)) for item in items]
    if ability == "count":
        return [Scene((item,), count=count) for item, count in product(items, COUNTS)]
    pairs = [(a, b) for a, b in product(items, items) if a.color != b.color and a.form != b.form]
    if ability == "composition":
        return [Scene(pair) for pair in pairs]
    if ability == "location":
        return [Scene(pair, relation=relation) for pair, relation in product(pairs, RELATIONS)]
    raise ValueError(f"unknown ability {ability!r}; use one of {', '.join(ABILITIES)}")


def random_scene(rng: np.random.Generator, weights: Sequence[float] | None = None) -> Scene:
    """A scene of a random ability (`weights`: how often each), train and held-out pairs alike."""
    ability = str(rng.choice(ABILITIES, p=weights))
    if ability in ("color", "count"):
        item = _random_item(rng)
        return Scene((item,), count=1 if ability == "color" else int(rng.integers(2, 5)))
    first = second = _random_item(rng)
    while first.color == second.color or first.form == second.form:
        second = _random_item(rng)
    relation = str(rng.choice(list(RELATIONS))) if ability == "location" else None
    return Scene((first, second), relation=relation)


def _random_item(rng: np.random.Generator) -> Item:
    return Item(str(rng.choice(list(COLORS))), str(rng.choice(FORMS)))


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene without mistakes: uint8 [64, 64, 3], objects apart from one another."""
    radii = {1: (11, 17), 2: (9, 13), 3: (8, 11), 4: (7.5, 10)}
    low, high = radii[len(scene.objects)]
    radius = rng.uniform(low, high, size=len(scene.objects))
    centers = _place(scene, radius, rng)
    background = tuple(int(v) for v in rng.integers(228, 246) + rng.integers(-4, 5, size=3))
    scale = SUPERSAMPLE
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), background)
    draw = ImageDraw.Draw(image)
    for item, (x, y), r in zip(scene.objects, centers, radius, strict=True):
        color = tuple(
            int(v) for v in np.clip(np.array(COLORS[item.color]) + rng.integers(-10, 11, 3), 0, 255)
        )
        _draw_form(draw, item.form, x * scale, y * scale, r * scale, color)
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def _place(scene: Scene, radius: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centres [N, 2] (x, y) by rejection: inside the frame, two pixels apart, in their relation."""
    while True:
        # The margin keeps a two-pixel rim of background, from which the detector reads its colour.
        margin = radius[:, None] + 2
        centers = rng.uniform(margin, IMAGE_SIZE - margin, size=(len(radius), 2))
        delta = centers[:, None] - centers[None]
        # Chebyshev distance: bounding boxes may not overlap, whatever the forms.
        gap = np.abs(delta).max(-1) - radius[:, None] - radius[None]
        if (gap[~np.eye(len(radius), dtype=bool)] < 3).any():
            continue
        if scene.relation:
            axis = np.array(RELATIONS[scene.relation])
            offset = centers[0] - centers[1]
            if offset @ axis < radius.sum() + 3 or np.abs(offset @ axis[::-1]) > 16:
                continue
        # A description of two things side by side starts on the left.
        side_by_side = len(scene.objects) == 2 and scene.count == 1 and not scene.relation
        if side_by_side and centers[1, 0] - centers[0, 0] < radius.sum() + 3:
            continue
        return centers


def _draw_form(
    draw: ImageDraw.ImageDraw, form: str, x: float, y: float, r: float, color: tuple[int, ...]
) -> None:
    if form == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif form == "square":
        side = 0.92 * r
        draw.rectangle((x - side, y - side, x + side, y + side), fill=color)
    else:
        draw.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=color)
