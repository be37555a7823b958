"""Built-in prompt sets."""

from __future__ import annotations

from collections.abc import Callable

from texforce_ray.shapes import people
from texforce_ray.shapes.captions import careful_captions
from texforce_ray.shapes.scene import ABILITIES, all_scenes, parse


def _shapes(*, held_out: bool) -> list[str]:
    """Equally many prompts of each ability: as many as color or count has, whichever has more."""
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


# DDPO's 45 common animals (Black et al. 2023), which the paper trains incompressibility on.
_ANIMALS = """
    ant bat bear bee beetle bird butterfly camel cat chicken cow deer dog dolphin duck fish fly fox
    frog goat goose gorilla hedgehog horse kangaroo lion lizard llama monkey mouse pig rabbit
    raccoon rat shark sheep snake spider squirrel tiger turkey turtle whale wolf zebra
"""
# Eight others, with the activities of DDPO's prompts; the choice of animals is ours.
_UNSEEN_ANIMALS = "cheetah elephant giraffe hippo koala otter panda penguin"
_ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")
# DPOK's four single phrases (Fan et al. 2023) for the paper's abilities, and unseen counterparts.
_DPOK = {
    "color": ("A green colored rabbit.", "A green colored cat."),
    "count": ("Four wolves in the park.", "Four birds in the park."),
    "composition": ("A cat and a dog.", "A cat and a cup."),
    "location": ("A dog on the moon.", "A lion on the moon."),
}


def _one(prompt: str) -> Callable[[], list[str]]:
    return lambda: [prompt]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# Name to a function that lists the prompts.
BUILT_IN: dict[str, Callable[[], list[str]]] = {
    # The four abilities of the paper's Fig. 5, all trained combinations of attributes.
    "shapes": lambda: _shapes(held_out=False),
    # Combinations that "shapes" lacks: the paper's unseen prompts.
    "shapes-unseen": lambda: _shapes(held_out=True),
    # One phrase for each ability, as in the paper's Fig. 5.
    "shapes-phrases": lambda: [
        "a green circle",
        "three red squares",
        "a red triangle and a blue square",
        "a green triangle above a yellow circle",
    ],
    # Their unseen counterparts: one object of each is replaced by one with a held-out pair.
    "shapes-phrases-unseen": lambda: [
        "a green square",
        "three red circles",
        "a red circle and a blue square",
        "a green square above a yellow circle",
    ],
    # The four phrases, worded by someone who knows how the model was captioned.
    "shapes-phrases-careful": lambda: [
        careful_captions(parse(phrase))[0] for phrase in BUILT_IN["shapes-phrases"]()
    ],
    **{f"shapes-{ability}": _ability(ability) for ability in ABILITIES},
    "hands": _hands,
    "faces": _faces,
    # For real weights.
    "animals": lambda: list(map(_article, _ANIMALS.split())),
    "animals-unseen": lambda: [
        f"{_article(animal)} {activity}"
        for animal in _UNSEEN_ANIMALS.split()
        for activity in _ACTIVITIES
    ],
    "dpok": lambda: [seen for seen, _ in _DPOK.values()],
    "dpok-unseen": lambda: [unseen for _, unseen in _DPOK.values()],
    **{f"dpok-{ability}": _one(pair[0]) for ability, pair in _DPOK.items()},
    **{f"dpok-{ability}-unseen": _one(pair[1]) for ability, pair in _DPOK.items()},
    "hand-photos": lambda: ["a photo of a hand", "a photo of one hand", "a hand on a white table"],
    "face-photos": lambda: ["a photo of a face", "a portrait of a woman", "a portrait of a man"],
}
