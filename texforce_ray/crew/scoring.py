"""The servers of one reward as the driver sees them: retries, merging of units, statistics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from texforce_ray.actors.messages import Scores
from texforce_ray.cluster.answers import backoff
from texforce_ray.config import RewardConfig
from texforce_ray.crew.pool import ActorPool
from texforce_ray.errors import ActorError, BudgetSpentError, NobodyLeftError

_MERGE_WAIT_S = 0.05  # how long a unit waits for others to be scored with it


@dataclass
class ScoringStatistics:
    """Statistics since they were last taken. seconds: of each call, from request to answer."""

    seconds: list[float] = field(default_factory=list)
    queue: int = 0
    retries: int = 0

    def metrics(self, name: str) -> dict[str, float]:
        """Latency percentiles in seconds, the longest queue, the number of retries."""
        values = {"queue_max": float(self.queue), "retries": float(self.retries)}
        if self.seconds:
            p50, p95 = np.percentile(self.seconds, [50, 95])
            values |= {"latency_p50": float(p50), "latency_p95": float(p95)}
        return {f"scoring/{name}_{key}": value for key, value in values.items()}


@dataclass
class _Waiting:
    """A unit's images on their way to a server."""

    images: ray.ObjectRef
    prompts: list[str]
    metadata: list[dict[str, Any]]
    answer: asyncio.Future[Scores]


class RewardPool:
    """One reward's servers: `score` returns a reward's failure instead of raising it."""

    def __init__(self, reward: RewardConfig, actors: ActorPool) -> None:
        self.reward, self.actors = reward, actors
        self.statistics = ScoringStatistics()
        self._asked = 0
        self._waiting: list[_Waiting] = []
        self._timer: asyncio.TimerHandle | None = None
        self._calls: set[asyncio.Task[None]] = set()

    def take_statistics(self) -> dict[str, float]:
        """Metrics since the last call of this method."""
        taken, self.statistics = self.statistics, ScoringStatistics()
        return taken.metrics(self.reward.key)

    async def memory(self) -> dict[str, float]:
        """Peak memory of one server in MB."""
        peak, _ = await self.actors.run("memory", lambda actor: actor.memory.remote(), 30.0)
        return peak

    async def score(
        self, images: ray.ObjectRef, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Scores:
        """Scores of one unit's images; after all retries, the error instead of scores."""
        began = time.perf_counter()
        self._asked += 1
        self.statistics.queue = max(self.statistics.queue, self._asked - len(self.actors.actors))
        try:
            if self.reward.merge_units == 1:
                return await self._call([images], list(prompts), list(metadata))
            return await self._merged(images, list(prompts), list(metadata))
        finally:
            self._asked -= 1
            self.statistics.seconds.append(time.perf_counter() - began)

    async def _call(
        self, images: list[ray.ObjectRef], prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Scores:
        """One call, retried up to `retries` times, whatever the cause."""
        answer = Scores(None, "never tried", 0.0)
        for attempt in range(self.reward.retries + 1):
            self.statistics.retries += bool(attempt)
            await asyncio.sleep(backoff(attempt, self.reward.retry_pause_s))
            try:
                answer, _ = await self.actors.run(
                    f"scoring {len(prompts)} images",
                    lambda actor: actor.score.remote(prompts, metadata, *images),
                    self.reward.timeout_s,
                )
            except (NobodyLeftError, BudgetSpentError):
                raise  # a mask is permanent, and Ray may be at fault
            except ActorError as error:  # the pool has already tried other servers
                return Scores(None, str(error), 0.0)
            if answer.error is None:
                return answer
        return answer

    async def _merged(
        self, images: ray.ObjectRef, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Scores:
        """Wait a moment for more units, then score all of them in one call."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(images, prompts, metadata, loop.create_future())
        self._waiting.append(waiting)
        if len(self._waiting) >= self.reward.merge_units:
            self._flush()
        elif self._timer is None:
            self._timer = loop.call_later(_MERGE_WAIT_S, self._flush)
        return await waiting.answer

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        units, self._waiting, self._timer = self._waiting, [], None
        task = asyncio.ensure_future(self._call_merged(units))
        self._calls.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._calls.discard)

    async def _call_merged(self, units: list[_Waiting]) -> None:
        prompts = [prompt for unit in units for prompt in unit.prompts]
        metadata = [entry for unit in units for entry in unit.metadata]
        try:
            answer = await self._call([unit.images for unit in units], prompts, metadata)
            first = 0
            for unit in units:
                share = len(unit.prompts) / len(prompts)
                part = slice(first, first + len(unit.prompts))
                first = part.stop
                mine = answer
                if answer.error is not None and len(units) > 1:
                    # One unit's bad image must not mask the others'.
                    mine = await self._call([unit.images], unit.prompts, unit.metadata)
                elif answer.scores is not None:
                    mine = Scores(answer.scores[part], None, answer.seconds * share)
                if not unit.answer.done():
                    unit.answer.set_result(mine)
        except BaseException as error:
            for unit in units:
                if not unit.answer.done():
                    unit.answer.set_exception(error)
            if isinstance(error, asyncio.CancelledError):
                raise
