"""Reward server: a thin shell around one reward. Imports without torch or pydantic."""

from __future__ import annotations

import math
import resource
import sys
import time
import traceback
from typing import Any

import numpy as np

from texforce_ray.actors.messages import (
    ImagePayload,
    Scores,
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

    def score(
        self, prompts: list[str], metadata: list[dict[str, Any]], *payloads: ImagePayload
    ) -> Scores:
        """Score B images, from one unit of work or several, in parts of at most `batch_size`.

        Raises:
            DeviceError: the GPU failed; this process should not be used again.
        """
        start = time.perf_counter()
        parts = [unpack_images(payload) for payload in payloads]
        images, scores = parts[0] if len(parts) == 1 else np.concatenate(parts), []
        images.flags.writeable = False
        deadline.begin(self.timeout_s)
        try:
            for first in range(0, len(prompts), self.batch_size):
                if deadline.left() < 0:
                    raise TimeoutError(
                        f"{first} of {len(prompts)} images took {time.perf_counter() - start:.0f} "
                        f"s, but the reward's timeout_s is {self.timeout_s:g}"
                    )
                part = slice(first, first + self.batch_size)
                values = self.reward.score(images[part], prompts[part], metadata[part])
                scores += checked_scores(values, len(prompts[part]), self.name)
        except Exception as error:  # a user's reward may raise anything: it is retried, then masked
            if is_device_fault(error):  # every later call would fail as well
                raise DeviceError(redacted(f"{type(error).__name__}: {error}")) from None
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            return Scores(None, redacted(message), time.perf_counter() - start)
        finally:
            deadline.end()
        return Scores(scores, None, time.perf_counter() - start)
