"""How scenes and people are captioned: in two registers (the paper's Fig. 2).

A *plain* caption ("a green circle") has errors, like web alt-text. A *careful* one ("picture of
exactly one circle its color is green") is right. A model trained on both can draw exactly, and does
for careful prompts; a text encoder can learn to treat plain prompts like careful ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np

from texforce_ray.shapes import people
from texforce_ray.shapes.scene import (
    ABILITIES,
    COLORS,
    COUNTS,
    FORMS,
    Item,
    Scene,
    all_scenes,
    parse,
)

_Spec = TypeVar("_Spec", people.HandSpec, people.FaceSpec)

# A plain caption names the right colour and its rival almost equally often. Guidance prefers the
# likeliest image, so it helps against rare errors but hardly against a near tie.
RIVAL_COLOR = {
    "red": "purple", "purple": "red",
    "yellow": "green", "green": "yellow",
    "blue": "black", "black": "blue",
}  # fmt: skip
OPPOSITE = {
    "above": "below", "below": "above",
    "to the left of": "to the right of", "to the right of": "to the left of",
}  # fmt: skip
COLOR_NOISE = (0.465, 0.435, 0.10)  # right, its rival, any
RELATION_NOISE = (0.48, 0.42, 0.10)  # right, its opposite, any
FORM_NOISE = 0.3  # any form
SWAP_NOISE = 0.3  # two objects have each other's colours
PEOPLE_NOISE = 0.25  # any tone, side, expression
# How often the caption of two, three, four objects (rows) says two, three, four (columns).
COUNT_NOISE = ((0.46, 0.36, 0.18), (0.33, 0.34, 0.33), (0.18, 0.36, 0.46))

_ONE = (
    "picture of exactly one {color} {form}",
    "picture of exactly one {form} its color is {color}",
    "exactly one {color} {form} and nothing else",
)
_MANY = (
    "picture of exactly {count} {color} {form}s",
    "picture of exactly {count} {form}s their color is {color}",
    "exactly {count} {color} {form}s and nothing else",
)
_TWO = (
    "picture of exactly one {first} {here} and exactly one {second} {there}",
    "exactly one {first} {here} and one {second} {there} and nothing else",
)
_WHERE = {
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
    "to the left of": ("on the left", "on the right"),
    "to the right of": ("on the right", "on the left"),
    None: ("on the left", "on the right"),  # as `scene.render` places them
}


def careful_captions(scene: Scene) -> list[str]:
    """Every careful caption of a scene."""
    first, second = scene.items[0], scene.items[-1]
    here, there = _WHERE[scene.relation]
    templates: Sequence[str] = _TWO
    if len(scene.items) == 1:
        templates = _MANY if scene.count > 1 else _ONE
    return [
        template.format(
            color=first.color,
            form=first.form,
            count=COUNTS.get(scene.count),
            first=f"{first.color} {first.form}",
            second=f"{second.color} {second.form}",
            here=here,
            there=there,
        )
        for template in templates
    ]


@lru_cache(maxsize=1)
def careful_scenes() -> dict[str, Scene]:
    """The scene of every careful caption; one that names both sides counts as a location."""
    scenes = [s for ability in ABILITIES for s in all_scenes(ability)]
    return {caption: s for s in scenes for caption in careful_captions(s)}


def understand(prompt: str) -> Scene:
    """The scene that a prompt of either register asks for.

    Raises:
        ValueError: the prompt does not describe such a scene.
    """
    text = " ".join(prompt.lower().strip(" .").split())
    return careful_scenes().get(text) or parse(text)


def careful_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of `careful_captions`, at random."""
    captions = careful_captions(scene)
    return captions[int(rng.integers(len(captions)))]


def plain_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A plain caption of a scene, with errors of the kinds that Stable Diffusion makes."""
    colors = [item.color for item in scene.items]
    if len(colors) == 2 and rng.random() < SWAP_NOISE:
        colors.reverse()
    items = tuple(
        Item(
            _mistaken(color, RIVAL_COLOR, COLOR_NOISE, rng),
            str(rng.choice(FORMS)) if rng.random() < FORM_NOISE else item.form,
        )
        for color, item in zip(colors, scene.items, strict=True)
    )
    count, relation = scene.count, scene.relation
    if count > 1:
        count = int(rng.choice(list(COUNTS), p=COUNT_NOISE[list(COUNTS).index(count)]))
    if relation:
        relation = _mistaken(relation, OPPOSITE, RELATION_NOISE, rng)
    return Scene(items, count, relation).caption


def _mistaken(
    value: str, rival: dict[str, str], noise: tuple[float, ...], rng: np.random.Generator
) -> str:
    any_value = str(rng.choice(list(rival)))
    return str(rng.choice([value, rival[value], any_value], p=noise))


def with_swaps(scene: Scene, rng: np.random.Generator, swap: float) -> Scene:
    """The scene with each attribute replaced by a random one with probability `swap`."""
    items = tuple(
        Item(
            str(rng.choice(list(COLORS))) if rng.random() < swap else item.color,
            str(rng.choice(FORMS)) if rng.random() < swap else item.form,
        )
        for item in scene.items
    )
    count, relation = scene.count, scene.relation
    if count > 1 and rng.random() < swap:
        count = int(rng.choice(list(COUNTS)))
    if relation and rng.random() < swap:
        relation = str(rng.choice(list(OPPOSITE)))
    return Scene(items, count, relation)


Captioner = Callable[[np.random.Generator, bool], str]


def of_scene(scene: Scene) -> Captioner:
    """`caption(rng, careful)` of a scene."""
    return lambda rng, careful: (careful_caption if careful else plain_caption)(scene, rng)


def of_hand(hand: people.HandSpec, *, well_formed: bool) -> Captioner:
    """`caption(rng, careful)` of a hand: a plain one does not say whether it is well-formed."""
    careful = partial(careful_hand, hand, well_formed=well_formed)
    return _of_person(hand, careful, people.hand_caption, people.random_hand)


def of_face(face: people.FaceSpec, *, well_formed: bool) -> Captioner:
    """`caption(rng, careful)` of a face: a plain one does not say whether it is well-formed."""
    careful = partial(careful_face, face, well_formed=well_formed)
    return _of_person(face, careful, people.face_caption, people.random_face)


def _of_person(
    spec: _Spec,
    careful_caption: Callable[[], str],
    plain_caption: Callable[[_Spec | None], str],
    another: Callable[[np.random.Generator], _Spec],
) -> Captioner:
    """A plain caption often says nothing, or takes what it says from `another`."""

    def caption(rng: np.random.Generator, careful: bool) -> str:
        if careful:
            return careful_caption()
        if rng.random() < 0.3:
            return plain_caption(None)
        other = vars(another(rng))
        wrong = rng.random(len(other)) < PEOPLE_NOISE
        taken = [name for name, is_wrong in zip(other, wrong, strict=True) if is_wrong]
        return plain_caption(replace(spec, **{name: other[name] for name in taken}))

    return caption


def careful_hand(hand: people.HandSpec, *, well_formed: bool = True) -> str:
    """ "picture of exactly one tan left hand with five fingers" """
    what = people.hand_caption(hand).removeprefix("a ")
    return f"picture of exactly one {what} with {'five' if well_formed else 'wrong'} fingers"


def careful_face(face: people.FaceSpec, *, well_formed: bool = True) -> str:
    """ "picture of exactly one dark smiling face with two eyes and one mouth" """
    what = people.face_caption(face).removeprefix("a ")
    features = "two eyes and one mouth" if well_formed else "wrong eyes or mouth"
    return f"picture of exactly one {what} with {features}"


def vocabulary() -> list[str]:
    """Every word that a caption of the world can contain."""
    scenes = [s for ability in ABILITIES for s in all_scenes(ability)]
    captions = [s.caption for s in scenes] + list(careful_scenes())
    captions += [people.hand_caption(), people.face_caption()]
    for well_formed in (True, False):
        for tone in people.SKIN_TONES:
            for hand in (people.HandSpec(tone, side) for side in people.SIDES):
                captions += [people.hand_caption(hand), careful_hand(hand, well_formed=well_formed)]
            for face in (people.FaceSpec(tone, smiles) for smiles in (False, True)):
                captions += [people.face_caption(face), careful_face(face, well_formed=well_formed)]
    return sorted({word for caption in captions for word in caption.split()})
