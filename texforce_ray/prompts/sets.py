"""Built-in prompt sets."""

from __future__ import annotations

from collections.abc import Callable

from texforce_ray.shapes import people
from texforce_ray.shapes.scene import ABILITIES, all_scenes


def _shapes(*, held_out: bool) -> list[str]:
    """Every ability alike: as many prompts of each as the smallest has."""
    by_ability = [
        [scene.caption for scene in all_scenes(ability) if scene.held_out == held_out]
        for ability in ABILITIES
    ]
    count = max(map(len, by_ability[:2]))
    return [captions[i * len(captions) // count] for i in range(count) for captions in by_ability]


def _ability(name: str) -> Callable[[], list[str]]:
    return lambda: [scene.caption for scene in all_scenes(name) if not scene.held_out]


def _hands() -> list[str]:
    specs = [people.HandSpec(tone, side) for tone in people.SKIN_TONES for side in people.SIDES]
    return [people.hand_caption(), *map(people.hand_caption, specs)]


def _faces() -> list[str]:
    specs = [
        people.FaceSpec(tone, smiles) for tone in people.SKIN_TONES for smiles in (True, False)
    ]
    return [people.face_caption(), *map(people.face_caption, specs)]


# name: function that lists the prompts.
BUILT_IN: dict[str, Callable[[], list[str]]] = {
    # The four abilities of the paper's Fig. 5, all trained combinations of attributes.
    "shapes": lambda: _shapes(held_out=False),
    # Combinations that "shapes" does not have: the paper's unseen prompts.
    "shapes-unseen": lambda: _shapes(held_out=True),
    # One phrase for each ability, as in the paper's Fig. 5.
    "shapes-phrases": lambda: [
        "a green circle",
        "three red squares",
        "a red triangle and a blue square",
        "a green triangle above a yellow circle",
    ],
    **{f"shapes-{ability}": _ability(ability) for ability in ABILITIES},
    "hands": _hands,
    "faces": _faces,
}
