"""Reward server: a thin shell around one reward. Imports without torch or pydantic."""

from __future__ import annotations

import os
import time
import traceback
from typing import Any

from texforce_ray.actors.messages import ImagePayload, Scores, unpack_images
from texforce_ray.rewards.base import checked_scores, load_reward


class RewardServer:
    """Scores images with one reward; a failure travels back as data, not as an exception."""

    def __init__(self, name: str, target: str, kwargs: dict[str, Any], batch_size: int) -> None:
        self.name, self.batch_size = name, batch_size
        self.reward = load_reward(target, kwargs)

    def ready(self) -> str:
        """The process, for log messages."""
        return f"pid {os.getpid()}"

    def score(
        self, payload: ImagePayload, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Scores:
        """Score B images in parts of at most `batch_size`."""
        start = time.perf_counter()
        images, scores = unpack_images(payload), []
        try:
            for first in range(0, len(prompts), self.batch_size):
                part = slice(first, first + self.batch_size)
                values = self.reward.score(images[part], prompts[part], metadata[part])
                scores += checked_scores(values, len(prompts[part]), self.name)
        except Exception as error:  # a user's reward may raise anything: it is retried, then masked
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            return Scores(None, message, time.perf_counter() - start)
        return Scores(scores, None, time.perf_counter() - start)
