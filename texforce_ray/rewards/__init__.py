"""Rewards. The built-in ones are listed in one table; any other is 'package.module:Class'.

Many run in environments without pydantic or torch, so no reward imports pydantic, and only those
with a torch model import torch. May import shapes, errors and files; `differentiable.py`, which
runs in the learner, also the config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from texforce_ray.errors import RewardError

_HERE = "texforce_ray.rewards"


@dataclass(frozen=True)
class Entry:
    """A built-in reward: loaded only in the reward's own process.

    target: 'package.module:Class'. packages: its set in `isolation.SETS`. isolated: whether it
    gets that environment unless the config says otherwise; the others run beside the rollouts.
    scores: the range. source: where it comes from. differentiable: whether it offers
    `score_differentiable`.
    """

    target: str
    packages: str
    isolated: bool
    scores: str
    source: str
    differentiable: bool = False


BUILT_IN: dict[str, Entry] = {
    "shapes": Entry(
        f"{_HERE}.shapes:ShapesReward", "light", False, "0 to 1", "the shapes world: docs/shapes.md"
    ),
    "appearance": Entry(
        f"{_HERE}.appearance:AppearanceReward",
        "light",
        False,
        "0 to 1",
        "the shapes world: docs/shapes.md",
    ),
    "shapes_scorer": Entry(
        f"{_HERE}.shapes_scorer:ShapesScorer",
        "clip",
        False,
        "0 to 1",
        "a network that learned to read images as `shapes` does: docs/shapes.md",
        differentiable=True,
    ),
    "jpeg_compressibility": Entry(
        f"{_HERE}.jpeg:JpegCompressibility", "light", False, "below 0 (kB)", "DDPO, section 5"
    ),
    "jpeg_incompressibility": Entry(
        f"{_HERE}.jpeg:JpegIncompressibility", "light", False, "above 0 (kB)", "DDPO, section 5"
    ),
    "imagereward": Entry(
        f"{_HERE}.image_reward:ImageReward",
        "image-reward",
        True,
        "about -2.5 to 2.5",
        "ImageReward, NeurIPS 2023",
    ),
    "hpsv2": Entry(
        f"{_HERE}.hps:HpsV2",
        "open-clip",
        True,
        "-1 to 1, mostly .2 to .3",
        "HPS v2, 2023",
        differentiable=True,
    ),
    "hpsv2.1": Entry(
        f"{_HERE}.hps:HpsV21",
        "open-clip",
        True,
        "-1 to 1, mostly .2 to .35",
        "HPS v2.1, 2023",
        differentiable=True,
    ),
    "pickscore": Entry(
        f"{_HERE}.clip:PickScore",
        "clip",
        False,
        "about 15 to 28",
        "Pick-a-Pic, NeurIPS 2023",
        differentiable=True,
    ),
    "clip_score": Entry(
        f"{_HERE}.clip:ClipScore", "clip", False, "-1 to 1", "CLIP, ICML 2021", differentiable=True
    ),
    "aesthetic": Entry(
        f"{_HERE}.clip:Aesthetic",
        "clip",
        False,
        "about 1 to 10",
        "LAION-Aesthetics V2, 2022",
        differentiable=True,
    ),
    "hand": Entry(
        f"{_HERE}.hand:Hand", "mediapipe", True, "0 to 1", "MediaPipe Hands; TexForce, section 4"
    ),
    "face": Entry(
        f"{_HERE}.face:Face", "mediapipe", True, "0 to 1", "MediaPipe Face; TexForce, section 4"
    ),
    "vlm": Entry(f"{_HERE}.vlm:VlmJudge", "http", False, "as the rubric says", "LLM-as-a-judge"),
    "http": Entry(f"{_HERE}.http_client:HttpReward", "http", False, "the service's", "your own"),
}

# 'iqa:<metric>' is any metric of pyiqa; `check` prints the metric's own range.
IQA = Entry(f"{_HERE}.iqa:IqaReward", "pyiqa", True, "the metric's, higher is better", "pyiqa")


def find(name: str) -> Entry:
    """The table entry of a built-in name.

    Raises:
        RewardError: an unknown name.
    """
    if name.startswith("iqa:") and len(name) > len("iqa:"):
        return IQA
    if name not in BUILT_IN:
        raise RewardError(
            f"unknown reward {name!r}; the built-in ones are {', '.join(sorted(BUILT_IN))} and "
            "iqa:<metric of pyiqa>; give your own as target: package.module:Class"
        )
    return BUILT_IN[name]


def resolve(name: str | None, target: str | None) -> str:
    """The 'package.module:Class' of a built-in name or of a user's target.

    Raises:
        RewardError: an unknown name.
    """
    if target is not None:
        return target
    return find(str(name)).target


def check_differentiable(name: str | None) -> None:
    """Raise RewardError if a built-in reward has no gradient; users' own are checked on loading."""
    if name is not None and not find(name).differentiable:
        able = ", ".join(sorted(key for key, entry in BUILT_IN.items() if entry.differentiable))
        raise RewardError(
            f"objective.kind 'direct': reward {name!r} has no gradient to the image; use one of "
            f"{able}, or your own with a method score_differentiable(images, prompts), or set its "
            "weight to 0 to only record it, or train with PPO (objective.kind: ppo), which needs "
            "no gradient"
        )


def arguments(name: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments: the config's, and those that the name implies."""
    if name is not None and name.startswith("iqa:"):
        return {"metric": name.removeprefix("iqa:")} | kwargs
    return kwargs


def split_name(name: str) -> tuple[str | None, str | None]:
    """(built-in name, None) or (None, target) from a command-line argument."""
    own = ":" in name and not name.startswith("iqa:")
    return (None, name) if own else (name, None)
