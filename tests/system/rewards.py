"""Rewards as users might write them, well and badly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from texforce_ray.actors.messages import ImagePayload, Scores, ScoringTask
from texforce_ray.actors.reward import RewardServer


class Redness:
    """Fails on the first call of every batch; cannot score the first image of each."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        key = hash(images.tobytes())
        if key not in self.seen:
            self.seen.add(key)
            raise ConnectionError("first calls always fail")
        red = images[..., 0].astype(float) - images[..., 1:].mean(-1)
        return [float("nan"), *red.mean(axis=(1, 2))[1:]]


class PlainRedness:
    """How much redder than green or blue an image is, whatever the prompt: easily hacked."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        red = images[..., 0].astype(float) - images[..., 1:].mean(-1)
        return red.mean(axis=(1, 2)).tolist()


class NoScore:
    """Lacks the one method."""


class Broken:
    """Raises for ever."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        raise OSError("the scoring service is down")


class Counting:
    """Scores each image by how many came with it."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        return [float(len(images))] * len(images)


class TooFew:
    """Forgets an image."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        return [0.0] * (len(images) - 1)


class Infinite:
    """Divides by zero."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        return [float("inf")] * len(images)


class Words:
    """Answers in prose."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        return ["good"] * len(images)


class CountingServer(RewardServer):
    """Appends a line to `trace` for each call: how many tasks it has."""

    trace = ""

    def score(self, tasks: Sequence[ScoringTask], *payloads: ImagePayload) -> list[Scores]:
        with open(self.trace, "a") as file:
            file.write(f"{len(tasks)}\n")
        return super().score(tasks, *payloads)
