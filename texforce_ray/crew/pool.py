"""A pool of interchangeable actors: hands out tasks, retries them, restarts hung actors.

A task goes to whichever actor is free; its result does not depend on which one. Every wait has a
deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from texforce_ray.actors.messages import Whereabouts
from texforce_ray.cluster.answers import (
    GONE,
    advice,
    backoff,
    comes_back,
    log_tail,
    one_line,
    readable,
)
from texforce_ray.crew.budget import Budget
from texforce_ray.crew.calls import SETTLE_S, Result, answer, died, failed, together
from texforce_ray.crew.member import Member
from texforce_ray.errors import (
    ActorError,
    BudgetSpentError,
    DeviceError,
    LostObjectError,
    NobodyLeftError,
    NoneFreeError,
    TexForceError,
    redacted,
)

log = logging.getLogger(__name__)

Submit = Callable[[Any], Any]  # calls a method of an actor; returns its ref or refs
SubmitRank = Callable[[int, Any], Any]  # the same, given the actor's index in the pool

_PAUSE_S = 0.1
_NOBODY = -1  # wakes the tasks that wait for a free actor when none is left


class ActorPool:
    """Actors behind one `run`: small results are awaited, refs to large ones are kept.

    Actors join as they become ready, including those for which the cluster has yet to grow and
    those that were restarted.
    """

    def __init__(
        self,
        name: str,
        actors: Sequence[Any],
        *,
        retries: int,
        start_timeout: float = 180.0,
        budget: Budget | None = None,
    ) -> None:
        self.name, self.actors, self.retries = name, list(actors), retries
        self.start_timeout = start_timeout
        self.budget = budget or Budget(1_000_000)
        self.restarts = 0
        self.queued = 0  # tasks that wait for a free actor
        self.last_answer = time.monotonic()
        self._doing: dict[int, tuple[str, float]] = {}
        self._joining: dict[int, asyncio.Task[Whereabouts]] = {}
        self._present: set[int] = set()
        self._where: dict[int, Whereabouts] = {}  # reported by each when it starts
        self._errors: dict[int, TexForceError] = {}  # of permanently gone actors
        self._idle: asyncio.Queue[int] = asyncio.Queue()

    async def ready(self, timeout: float, at_least: int | None = None) -> None:
        """Wait until actors have started: all, or `at_least`.

        Raises:
            ActorError: an actor's constructor failed, or `timeout` seconds passed.
        """
        self._start()
        wanted = len(self.actors) if at_least is None else at_least
        waiting = set(self._joining.values())
        deadline = asyncio.get_running_loop().time() + timeout
        while len(self._present) < wanted and waiting:
            left = deadline - asyncio.get_running_loop().time()
            done, waiting = await asyncio.wait(
                waiting, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()  # a constructor's error ends the wait
            if not done:
                late = next(i for i in range(len(self.actors)) if i not in self._present)
                raise ActorError(
                    f"{self.name}-{late} did not start within {timeout:.0f} s "
                    "(ray.start_timeout_s): no room on any single node, or slow imports"
                )

    async def run(
        self, task: str, submit: Submit, timeout: float, retries: int | None = None
    ) -> Result:
        """Run one task on a free actor.

        Args:
            task: its description, for error messages.
            submit: calls a method of the actor that it is given; returns the call's refs.
            timeout: seconds per try.
            retries: default: the pool's.

        Returns:
            The value of the first ref, and the other refs unfetched.

        Raises:
            ActorError: naming actor, task and cause, when the task raised or all tries failed.
            LostObjectError: an input of the task is lost; trying again would not help.
        """
        self._start()
        retries = self.retries if retries is None else retries
        for attempt in range(retries + 1):
            await asyncio.sleep(backoff(attempt, _PAUSE_S))
            index = await self._free(task)
            lost = False
            self._doing[index] = task, time.monotonic()
            try:
                result = await answer(submit(self.actors[index]), timeout)
                self.last_answer = time.monotonic()
                return result
            except (*GONE, DeviceError, TimeoutError) as error:
                lost = True
                self._lost(index, task, error, timeout, attempt + 1, last=attempt == retries)
            except RayError as error:
                raise readable(f"{self.name}-{index}", task, error) from None
            finally:
                self._doing.pop(index, None)
                if not lost:
                    self._idle.put_nowait(index)
        raise AssertionError("unreachable")

    async def run_together(
        self, task: str, prepare: Callable[[], Awaitable[SubmitRank]], timeout: float
    ) -> Result:
        """Run one task on all actors at once; returns the result of the first.

        They work on it together: if one is lost, the others wait for it in vain, so all are
        restarted before the next try. `prepare` is awaited before each try, while all are free.

        Raises:
            ActorError: as `run`.
        """
        self._start()
        for attempt in range(self.retries + 1):
            await asyncio.sleep(backoff(attempt, _PAUSE_S))
            members = await self._all_free(task)
            lost: set[int] = set()
            self._doing |= {index: (task, time.monotonic()) for index in members}
            answers: list[asyncio.Future[Result]] = []
            try:
                submit = await prepare()
                answers += [
                    asyncio.ensure_future(answer(submit(i, self.actors[i]), timeout))
                    for i in members
                ]
                result = (await together(answers))[0]
                self.last_answer = time.monotonic()
                return result
            except (*GONE, DeviceError, TimeoutError) as error:
                lost = set(members)
                dead = [i for i, call in enumerate(answers) if died(call)]
                causes = [i for i, call in enumerate(answers) if failed(call)]
                for index in members:
                    if index not in dead:
                        ray.kill(self.actors[index], no_restart=False)
                self._rejoin(members)
                first, last = (causes or [0])[0], attempt == self.retries
                self._note(first, task, error, timeout, attempt + 1, last=last)
            except RayError as error:
                found = readable(self.name, task, error)
                if isinstance(found, LostObjectError) and len(members) > 1:
                    lost = set(members)  # the others wait for the one that lost its input
                    for index in members:
                        ray.kill(self.actors[index], no_restart=False)
                    self._rejoin(members)
                raise found from None
            finally:
                for index in members:
                    self._doing.pop(index, None)
                for index in set(members) - lost:
                    self._idle.put_nowait(index)
        raise AssertionError("unreachable")

    def all_busy(self) -> bool:
        """Whether every actor that has started is at work."""
        return 0 < len(self._present) <= len(self._doing)

    def waiting(self) -> list[str]:
        """What every busy actor is doing, and for how long."""
        now = time.monotonic()
        return [
            f"{self.name}-{index}: {task} ({now - since:.0f} s)"
            for index, (task, since) in self._doing.items()
        ]

    def members(self) -> list[Member]:
        """All actors in order."""
        return [self._member(index) for index in range(len(self.actors))]

    def _member(self, index: int) -> Member:
        name, where = f"{self.name}-{index}", self._where.get(index)
        if index in self._doing:
            task, since = self._doing[index]
            return Member(name, "busy", where, task, time.monotonic() - since)
        if index in self._present:
            return Member(name, "idle", where)
        return Member(name, "gone" if index in self._errors else "starting", where)

    def kill(self) -> None:
        """Kill all actors; their results stay, because the driver owns them."""
        for task in self._joining.values():
            task.cancel()
        for actor in self.actors:
            ray.kill(actor)

    # ---- membership ----------------------------------------------------------------------

    def _start(self) -> None:
        if not self._joining:
            self._rejoin(range(len(self.actors)), again=False)

    def _rejoin(self, indices: Sequence[int], *, again: bool = True) -> None:
        for index in indices:
            self._present.discard(index)
            self._joining[index] = asyncio.ensure_future(self._join(index, again=again))
            self._joining[index].add_done_callback(_retrieved)

    async def _join(self, index: int, *, again: bool) -> Whereabouts:
        """Wait for an actor to start, however long the cluster takes; then give it work."""
        actor, before = self.actors[index], self._where.get(index) if again else None
        patience = time.monotonic() + SETTLE_S
        while True:
            try:
                # Unlike a task, this harmless call may wait for and survive a restart. The first
                # one must not: Ray would print a constructor's error on every try.
                retries = -1 if again else 0
                ref = actor.ready.options(max_task_retries=retries).remote()
                answer = await asyncio.wrap_future(ref.future())
                if answer != before or time.monotonic() > patience:
                    break
                await asyncio.sleep(_PAUSE_S)  # this came from the process being killed
            except RayError as error:
                found: TexForceError
                try:
                    if isinstance(error, GONE) and not again and comes_back(actor):
                        self.budget.spend(f"{self.name}-{index} at start: {one_line(error, 0)}")
                        self.restarts += 1
                        again = True
                        continue
                    found = readable(f"{self.name}-{index}", "start", error)
                except BudgetSpentError as spent:
                    found = spent
                self._errors[index] = found
                if len(self._errors) == len(self.actors):
                    self._idle.put_nowait(_NOBODY)
                raise found from None
        self._present.add(index)
        self._where[index] = answer
        self._idle.put_nowait(index)
        return answer

    async def _all_free(self, task: str) -> list[int]:
        """All actors, in order, once all are free.

        Raises:
            ActorError: as `_free`; those that were free are available again.
        """
        members: list[int] = []
        try:
            while len(members) < len(self.actors):
                members.append(await self._free(task, others_work=False))
        except BaseException:
            for index in members:
                self._idle.put_nowait(index)
            raise
        return sorted(members)

    async def _free(self, task: str, *, others_work: bool = True) -> int:
        """The next free actor; `others_work`: busy actors will become free.

        Raises:
            NobodyLeftError: no actor is left.
            NoneFreeError: no actor became free in time.
        """
        while True:
            self.queued += 1
            try:
                async with asyncio.timeout(self.start_timeout):
                    index = await self._idle.get()
            except TimeoutError:
                if self._present and others_work:  # each of their tasks has a deadline
                    continue
                raise NoneFreeError(
                    f"no {self.name} actor became free within {self.start_timeout:.0f} s for "
                    f"{task} (ray.start_timeout_s); check that the cluster has room for it"
                ) from None
            finally:
                self.queued -= 1
            if index != _NOBODY:
                return index
            self._idle.put_nowait(_NOBODY)  # for the next waiting task
            raise NobodyLeftError(
                f"no {self.name} actor is left for {task}; the last error: "
                f"{list(self._errors.values())[-1]} (ray.max_restarts)"
            )

    def _lost(
        self, index: int, task: str, error: Exception, timeout: float, tries: int, *, last: bool
    ) -> None:
        """An actor died or hangs: it may come back, but its task goes to another one."""
        if isinstance(error, (TimeoutError, DeviceError)):
            ray.kill(self.actors[index], no_restart=False)
        self._rejoin([index])
        self._note(index, task, error, timeout, tries, last=last)

    def _note(
        self, index: int, task: str, error: Exception, timeout: float, tries: int, *, last: bool
    ) -> None:
        where = self._where.get(index)
        # A device's error says it all; the log's end would bury it.
        tail = "" if isinstance(error, DeviceError) else log_tail(where and where.pid)
        cause = f"{one_line(error, timeout)}{advice(self.name, error)}{redacted(tail)}"
        name = f"{self.name}-{index} ({where})" if where else f"{self.name}-{index}"
        self.budget.spend(f"{name} at {task}: {cause}")
        if last:
            raise ActorError(f"{name} failed at {task} after {tries} tries: {cause}") from None
        log.warning("%s-%d failed at %s (%s); trying again", self.name, index, task, cause)
        self.restarts += 1


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Retrieve a failure, so that asyncio does not print it; `_errors` keeps it."""
    if not task.cancelled():
        task.exception()
