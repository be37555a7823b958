"""Reward server: a thin shell around one reward. Imports without torch or pydantic."""

from __future__ import annotations

import math
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from texforce_ray.actors.messages import (
    ImagePayload,
    Scores,
    ScoringTask,
    Whereabouts,
    unpack_images,
    whereabouts,
)
from texforce_ray.errors import DeviceError, is_device_fault, redacted
from texforce_ray.rewards import deadline
from texforce_ray.rewards.base import checked_scores, load_reward


class RewardServer:
    """Scores images with one reward; a failure is returned as data, not as an exception."""

    def __init__(
        self,
        name: str,
        target: str,
        kwargs: dict[str, Any],
        batch_size: int,
        timeout_s: float = math.inf,
    ) -> None:
        self.name, self.batch_size, self.timeout_s = name, batch_size, timeout_s
        self.reward = load_reward(target, kwargs)

    def ready(self) -> Whereabouts:
        """Where this server runs, once it has started."""
        return whereabouts(sys.executable)

    def memory(self) -> dict[str, float]:
        """Peak memory in MB: of the process, and on the GPU if torch is loaded and has one."""
        peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            peak["gpu"] = torch.cuda.max_memory_allocated() / 1e6
        return peak

    def score(self, tasks: Sequence[ScoringTask], *payloads: ImagePayload) -> list[Scores]:
        """Score the images of each task, in parts of at most `batch_size`.

        All tasks of a call share one deadline.

        Raises:
            DeviceError: the GPU failed; this process should not be used again.
        """
        remaining, began = iter(payloads), time.perf_counter()
        deadline.begin(self.timeout_s)
        try:
            return [
                self._scores(task, list(islice(remaining, task.payloads)), began) for task in tasks
            ]
        finally:
            deadline.end()

    def _scores(self, task: ScoringTask, payloads: list[ImagePayload], began: float) -> Scores:
        """`began`: the call's start, from which its deadline counts."""
        start = time.perf_counter()
        count, scores = len(task.prompts), []
        try:
            parts = [unpack_images(payload) for payload in payloads]
            images = parts[0] if len(parts) == 1 else np.concatenate(parts)
            images.flags.writeable = False
            for first in range(0, count, self.batch_size):
                if deadline.left() < 0:
                    raise TimeoutError(
                        f"{first} of {count} images were scored after "
                        f"{time.perf_counter() - began:.0f} s, but the reward's timeout_s is "
                        f"{self.timeout_s:g}"
                    )
                part = slice(first, first + self.batch_size)
                values = self.reward.score(images[part], task.prompts[part], task.metadata[part])
                scores += checked_scores(values, len(task.prompts[part]), self.name)
        except Exception as error:  # a user's reward may raise anything: it is retried, then masked
            if is_device_fault(error):  # every later call would fail as well
                raise DeviceError(redacted(f"{type(error).__name__}: {error}")) from None
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            return Scores(None, redacted(message), time.perf_counter() - start)
        return Scores(scores, None, time.perf_counter() - start)
