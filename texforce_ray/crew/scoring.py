"""The servers of one reward as the driver sees them: queue, batches, retries, statistics.

Units that wait while all servers are busy share a call, if the reward is quick: then calls, not
scores, are what takes the time. A call's units are scored one by one, or `merge_units` together.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from texforce_ray.actors.messages import Scores, ScoringTask
from texforce_ray.cluster.answers import backoff
from texforce_ray.config import RewardConfig
from texforce_ray.crew.pool import ActorPool
from texforce_ray.errors import (
    ActorError,
    BudgetSpentError,
    LostObjectError,
    NobodyLeftError,
    NoneFreeError,
)

_MERGE_WAIT_S = 0.05  # how long a unit waits for others to be scored with it
_COMPANY_S = 0.2  # how long for others to share a call, if nobody waits for its scores
_MOST_UNITS = 16  # of a call
_CALL_S = 0.5  # how long a call with several units may take, and
_CALL_SHARE = 0.1  # which share of the deadline, which all of them share


@dataclass
class ScoringStatistics:
    """Statistics since they were last taken. seconds: of each unit, from request to answer."""

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


@dataclass(frozen=True)
class _Unit:
    """A unit's images on their way to a server."""

    images: ray.ObjectRef
    prompts: list[str]
    metadata: list[dict[str, Any]]
    answer: asyncio.Future[Scores]


class RewardPool:
    """One reward's servers: `score` returns a reward's failure instead of raising it."""

    def __init__(
        self,
        reward: RewardConfig,
        actors: ActorPool,
        sampling: Callable[[], bool] = lambda: False,
    ) -> None:
        """`sampling`: whether all rollout actors are at work, so that more units will come."""
        self.reward, self.actors, self.sampling = reward, actors, sampling
        self.statistics = ScoringStatistics()
        self._asked = 0
        self._waiting: list[_Unit] = []
        self._timer: asyncio.Handle | None = None
        self._patient_until = 0.0  # when those that wait must go
        self._calls: dict[asyncio.Task[None], list[_Unit]] = {}  # as many as servers
        self._again: dict[asyncio.Task[None], list[_Unit]] = {}
        self._unit_seconds = math.inf  # a unit's share of the last call

    def take_statistics(self) -> dict[str, float]:
        """Metrics since the last call of this method."""
        taken, self.statistics = self.statistics, ScoringStatistics()
        return taken.metrics(self.reward.key)

    async def memory(self) -> dict[str, float]:
        """Peak memory of one server in MB."""
        peak, _ = await self.actors.run("memory", lambda actor: actor.memory.remote(), 30.0)
        return peak

    async def score(
        self,
        images: ray.ObjectRef,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        *,
        hurry: bool = True,
    ) -> Scores:
        """Scores of one unit's images; after all retries, the error instead of scores.

        `hurry`: somebody waits for them; otherwise they may wait for others to share a call.
        """
        began = time.perf_counter()
        answer: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._asked += 1
        self.statistics.queue = max(self.statistics.queue, self._asked - len(self.actors.actors))
        if hurry or not self._waiting:
            self._patient_until = began if hurry else began + _COMPANY_S
        self._waiting.append(_Unit(images, list(prompts), list(metadata), answer))
        self._dispatch_soon()
        try:
            return await answer
        except asyncio.CancelledError:
            for call, units in (*self._calls.items(), *self._again.items()):
                if all(unit.answer.done() for unit in units):  # cancelled, here as elsewhere
                    call.cancel()
            raise
        finally:
            self._asked -= 1
            self.statistics.seconds.append(time.perf_counter() - began)

    # ---- calls ---------------------------------------------------------------------------

    def _dispatch_soon(self) -> None:
        """Look again once all units that are ready at this moment wait together.

        By then, the actor that has just sampled one is at work again, if it can be.
        """
        loop = asyncio.get_running_loop()
        if len(self._waiting) >= self.reward.merge_units:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_soon(self._dispatch_or_wait)
        elif self._timer is None:
            self._timer = loop.call_later(_MERGE_WAIT_S, self._dispatch_or_wait)

    def _dispatch_or_wait(self) -> None:
        """Wait while more units will come, and a call with several would still be short."""
        patient = time.perf_counter() < self._patient_until
        if patient and len(self._waiting) < self._units_at_once() and self.sampling():
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_MERGE_WAIT_S, self._dispatch_or_wait)
        else:
            self._dispatch()

    def _dispatch(self) -> None:
        """Give waiting units to the servers that have nothing to do."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waiting = [unit for unit in self._waiting if not unit.answer.done()]
        while self._waiting and len(self._calls) < len(self.actors.actors):
            count = self._units_of_a_call()
            units, self._waiting = self._waiting[:count], self._waiting[count:]
            call = asyncio.ensure_future(self._answer(units))
            self._calls[call] = units
            call.add_done_callback(self._called)

    def _called(self, call: asyncio.Task[None]) -> None:
        del self._calls[call]
        if self._waiting:
            self._dispatch_soon()

    def _units_of_a_call(self) -> int:
        """An equal share of what waits, as far as a call stays short; whole merges."""
        share, merge = -(-len(self._waiting) // len(self.actors.actors)), self.reward.merge_units
        return max(1, min(share, self._units_at_once()) // merge) * merge

    def _units_at_once(self) -> int:
        """How many units a short call may have, by how long the last ones took."""
        longest = min(_CALL_S, _CALL_SHARE * self.reward.timeout_s)
        return int(longest / max(self._unit_seconds, longest / _MOST_UNITS))

    async def _answer(self, units: list[_Unit]) -> None:
        """Score units in one call; those that fail are then tried again in calls of their own."""
        together = len(units) > 1
        try:
            answers, last = await self._call(units)
        except NoneFreeError as error:
            waiting, self._waiting = self._waiting, []
            for unit in (*units, *waiting):  # they would wait for the same, one after another
                _settle(unit, Scores(None, str(error), 0.0))
            return
        except Exception as error:
            if not (together and isinstance(error, LostObjectError)):
                for unit in units:
                    _settle(unit, error)
                return
            answers, last = [Scores(None, str(error), 0.0)] * len(units), False
        for unit, answer in zip(units, answers, strict=True):
            # Another unit of the call may be at fault.
            if answer.error is None or (last and not together):
                _settle(unit, answer)
            else:  # the server is free for others meanwhile
                alone = asyncio.ensure_future(self._answer_alone(unit, answer, together=together))
                self._again[alone] = [unit]
                alone.add_done_callback(self._again.pop)

    async def _answer_alone(self, unit: _Unit, answer: Scores, *, together: bool) -> None:
        """Try a unit again, up to `retries` times; at least once if it was never alone."""
        try:
            for attempt in range(1, max(self.reward.retries, int(together)) + 1):
                self.statistics.retries += 1
                await asyncio.sleep(backoff(attempt, self.reward.retry_pause_s))
                (answer,), last = await self._call([unit])
                if answer.error is None or last:
                    break
            _settle(unit, answer)
        except NoneFreeError as error:
            _settle(unit, Scores(None, str(error), 0.0))
        except Exception as error:
            _settle(unit, error)

    async def _call(self, units: list[_Unit]) -> tuple[list[Scores], bool]:
        """One call: an answer for each unit, and whether the pool has tried all that it can.

        Raises:
            LostObjectError, NobodyLeftError, BudgetSpentError: not the reward's fault.
            NoneFreeError: no server was there for as long as one may take to start.
        """
        merge = self.reward.merge_units
        groups = [units[first : first + merge] for first in range(0, len(units), merge)]
        tasks = [_task(group) for group in groups]
        images = [unit.images for unit in units]
        try:
            results, _ = await self.actors.run(
                f"scoring {sum(len(unit.prompts) for unit in units)} images",
                lambda actor: actor.score.remote(tasks, *images),
                self.reward.timeout_s,
                # Who kills or blocks a server is found out by scoring them one by one.
                retries=0 if len(units) > 1 else None,
            )
        except (NobodyLeftError, NoneFreeError, BudgetSpentError):
            raise  # a mask is permanent, and Ray may be at fault
        except ActorError as error:
            self._unit_seconds = math.inf
            return [Scores(None, str(error), 0.0)] * len(units), True
        if all(result.error is None for result in results):
            self._unit_seconds = sum(result.seconds for result in results) / len(units)
        answers = [_shares(group, result) for group, result in zip(groups, results, strict=True)]
        return [answer for shares in answers for answer in shares], False


def _task(group: list[_Unit]) -> ScoringTask:
    """What a reward scores together."""
    prompts = [prompt for unit in group for prompt in unit.prompts]
    metadata = [entry for unit in group for entry in unit.metadata]
    return ScoringTask(prompts, metadata, len(group))


def _shares(group: list[_Unit], result: Scores) -> list[Scores]:
    """Each unit's part of its group's scores and seconds."""
    total, first = sum(len(unit.prompts) for unit in group), 0
    shares = []
    for unit in group:
        part = slice(first, first + len(unit.prompts))
        first = part.stop
        scores = None if result.scores is None else result.scores[part]
        shares.append(Scores(scores, result.error, result.seconds * len(unit.prompts) / total))
    return shares


def _settle(unit: _Unit, answer: Scores | Exception) -> None:
    """Answer, unless nobody waits for it any more."""
    if unit.answer.done():
        return
    if isinstance(answer, Exception):
        unit.answer.set_exception(answer)
    else:
        unit.answer.set_result(answer)
