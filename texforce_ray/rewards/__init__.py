"""Rewards. The built-in ones stand in one table; any other is 'package.module:Class'."""

from __future__ import annotations

from texforce_ray.errors import RewardError

# name: where it lives. Loaded only in the reward's own process.
BUILT_IN: dict[str, str] = {
    "shapes": "texforce_ray.rewards.shapes:ShapesReward",
    "jpeg_compressibility": "texforce_ray.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "texforce_ray.rewards.jpeg:JpegIncompressibility",
}


def resolve(name: str | None, target: str | None) -> str:
    """The 'package.module:Class' of a built-in name or of a user's target.

    Raises:
        RewardError: an unknown name.
    """
    if target is not None:
        return target
    if name not in BUILT_IN:
        raise RewardError(
            f"unknown reward {name!r}; built in are {', '.join(sorted(BUILT_IN))}, and your own "
            "is given as target: package.module:Class"
        )
    return BUILT_IN[name]
