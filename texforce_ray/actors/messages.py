"""Plain data that crosses between processes. No torch, no pydantic."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from texforce_ray.model.snapshot import Effect

if TYPE_CHECKING:
    from texforce_ray.records.looks import Looks

# Bytes and shape rather than an array: a numpy 2 array does not unpickle under numpy 1.
ImagePayload = tuple[bytes, tuple[int, int, int, int]]


@dataclass(frozen=True)
class WorkUnit:
    """One batch of samples, fixed by the config alone: whoever draws it draws the same bits.

    index is its place within the iteration; seeds: int64 [B].
    """

    iteration: int
    index: int
    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    seeds: np.ndarray
    policy_version: int

    def __len__(self) -> int:
        return len(self.prompts)


class Info(NamedTuple):
    """Small facts about a finished task, the only part that the driver fetches."""

    seconds: float
    looks: Looks | None = None  # of evaluation images
    flops: float = 0.0  # of the model, for these samples
    peak_flops: float = 0.0  # in a second, measured on the actor's device
    trajectory_bytes: int = 0
    image_bytes: int = 0
    trace: bytes | None = None  # torch's profile of the task, where it was asked for
    effect: Effect | None = None  # of the adapter that the actor holds
    who: str = ""  # the actor: device, process and node


class Scores(NamedTuple):
    """What a reward server answers: scores, or the reason why there are none."""

    scores: list[float] | None
    error: str | None
    seconds: float


def whereabouts(device: object) -> str:
    """This process, for messages about it: device, pid and node."""
    import ray

    return f"{device}, pid {os.getpid()} on {ray.util.get_node_ip_address()}"


def pack_images(images: np.ndarray) -> ImagePayload:
    """uint8 [B, H, W, 3] to bytes and shape."""
    return images.tobytes(), tuple(images.shape)


def unpack_images(payload: ImagePayload) -> np.ndarray:
    """The inverse of `pack_images`; the array is read-only."""
    data, shape = payload
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
