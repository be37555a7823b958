"""Plain data that processes exchange. No torch, no pydantic."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from texforce_ray.artifacts.snapshot import Effect

if TYPE_CHECKING:
    from ray import ObjectRef

    from texforce_ray.records.looks import Looks

# Ray resolves a ref that is itself an argument before the call. Inside a list or a dataclass it
# stays a ref, and the actor fetches it when, and only if, it needs the value.
Refs: TypeAlias = "Sequence[ObjectRef]"

# Bytes and shape rather than an array: a numpy 2 array does not unpickle under numpy 1.
ImagePayload = tuple[bytes, tuple[int, int, int, int]]


class Whereabouts(NamedTuple):
    """Where an actor runs: its device (a reward server's: its interpreter), process id and node."""

    device: str
    pid: int
    node: str

    def __str__(self) -> str:
        return f"{self.device}, pid {self.pid} on {self.node}"


def whereabouts(device: object) -> Whereabouts:
    """The whereabouts of this process."""
    import ray

    return Whereabouts(str(device), os.getpid(), ray.util.get_node_ip_address())


@dataclass(frozen=True)
class WorkUnit:
    """One batch of samples, fixed by the config alone: any actor draws the same bits for it.

    index: its place within the iteration; seeds: int64 [B].
    """

    iteration: int
    index: int
    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    seeds: np.ndarray
    policy_version: int

    def __len__(self) -> int:
        return len(self.prompts)


class SampleInfo(NamedTuple):
    """Small facts about a finished sampling task, the only part of it that the driver fetches."""

    seconds: float
    looks: Looks | None = None  # of evaluation images
    flops: float = 0.0  # of the model, for these samples
    peak_flops: float = 0.0  # per second, measured on the actor's device
    trajectory_bytes: int = 0
    image_bytes: int = 0
    trace: bytes | None = None  # torch's profile of the task, if requested
    effect: Effect | None = None  # of the adapter that the actor holds
    actor: Whereabouts | None = None


class ScoringTask(NamedTuple):
    """Images that a reward scores together, with a prompt and the metadata of each.

    payloads: how many of the call's image payloads they are, in order.
    """

    prompts: list[str]
    metadata: list[dict[str, Any]]
    payloads: int = 1


class Scores(NamedTuple):
    """A reward server's answer to one task: scores, or the reason why there are none."""

    scores: list[float] | None
    error: str | None
    seconds: float


class Membership(NamedTuple):
    """A learner's place among those that compute one update together."""

    rank: int = 0
    size: int = 1
    address: str | None = None  # where they meet


@dataclass(frozen=True)
class UpdateTask:
    """One iteration's update: policy `version` becomes `version + 1`.

    trajectories: a ref for each unit of work, in order. advantages: float64 [N]; mask: bool [N],
    True where a sample is used. learned: refs of the parts of `Learned` of that version. behaviour:
    a ref of the snapshot that sampled, if that is another version; else empty.
    """

    version: int
    trajectories: Refs
    advantages: np.ndarray
    mask: np.ndarray
    learned: Refs
    behaviour: Refs = ()


class Updated(NamedTuple):
    """What a learner reports about a version: metrics by their recorded names, and costs."""

    metrics: dict[str, float]
    effect: Effect | None = None
    seconds: float = 0.0
    fetch_seconds: float = 0.0  # part of `seconds`, for trajectories
    flops: float = 0.0
    peak_flops: float = 0.0  # per second, measured, of all learners
    trace: bytes | None = None  # torch's profile, if requested


def pack_images(images: np.ndarray) -> ImagePayload:
    """uint8 [B, H, W, 3] to bytes and shape."""
    return images.tobytes(), tuple(images.shape)


def unpack_images(payload: ImagePayload) -> np.ndarray:
    """The inverse of `pack_images`; the array is read-only."""
    data, shape = payload
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
