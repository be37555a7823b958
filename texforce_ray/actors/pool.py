"""A pool of equal actors: hands out tasks, retries them, restarts who hangs.

A task goes to whichever actor is free; its result does not depend on which that is. Every wait
has a deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from texforce_ray.actors.faults import (
    GONE,
    advice,
    comes_back,
    device_fault,
    log_tail,
    one_line,
)
from texforce_ray.actors.faults import readable as readable  # noqa: PLC0414 - others take it from here
from texforce_ray.errors import (
    ActorError,
    BudgetSpentError,
    DeviceError,
    LostObjectError,
    NobodyLeftError,
    PeerLostError,
    TexForceError,
    redacted,
)

log = logging.getLogger(__name__)

Submit = Callable[[Any], Any]  # calls a method of an actor; gives its ref or refs
SubmitRank = Callable[[int, Any], Any]  # the same, told which actor of the pool it is
Result = tuple[Any, tuple[ray.ObjectRef, ...]]

_SETTLE_S = 10.0  # after one of several failed, until the others have as well
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_NOBODY = -1  # wakes those who wait for a free actor when none is left


@dataclass(frozen=True)
class Member:
    """One actor, for whoever looks at the run.

    state: 'busy', 'idle', 'starting' (or waiting for room), 'gone' (for good). who: as it said when
    it started: device, process and node. doing: its task, for so many seconds.
    """

    name: str
    state: str
    who: str = ""
    doing: str = ""
    seconds: float = 0.0

    @property
    def node(self) -> str:
        return self.who.rpartition(" on ")[2] if " on " in self.who else ""


@dataclass
class Budget:
    """How many failures of actors a run bears, over all pools."""

    most: int
    spent: int = 0

    def spend(self, what: str) -> None:
        """Count one failure.

        Raises:
            BudgetSpentError: it was one too many.
        """
        self.spent += 1
        if self.spent > self.most:
            raise BudgetSpentError(
                f"actors failed {self.spent} times in this run (ray.max_run_restarts allows "
                f"{self.most}); the last one: {what}"
            )


class ActorPool:
    """Equal actors behind one `run`: small results are awaited, refs to large ones are kept.

    Actors join as they become ready, also later ones, for which the cluster has yet to grow, and
    ones that were restarted.
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
        self._joining: dict[int, asyncio.Task[str]] = {}
        self._present: set[int] = set()
        self._who: dict[int, str] = {}  # as each said when it started
        self._errors: dict[int, ActorError | TexForceError] = {}  # of actors that are gone for good
        self._idle: asyncio.Queue[int] = asyncio.Queue()

    async def ready(self, timeout: float, at_least: int | None = None) -> list[str]:
        """Wait until actors have started (all, or `at_least`); each answers who it is.

        Raises:
            ActorError: an actor's constructor failed, or `timeout` seconds went by.
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
        return [f"{self.name}-{index}" for index in sorted(self._present)]

    async def run(self, task: str, submit: Submit, timeout: float) -> Result:
        """Run one task on a free actor.

        Args:
            task: what it is, for error messages.
            submit: calls a method of the actor that it is given; returns the call's refs.
            timeout: seconds for one try.

        Returns:
            The value of the first ref, and the other refs unfetched.

        Raises:
            ActorError: naming actor, task and cause, when the task raised or all tries failed.
            LostObjectError: what the task was given is lost; trying again would not help.
        """
        self._start()
        for attempt in range(self.retries + 1):
            await asyncio.sleep(_pause(attempt))
            index = await self._free(task)
            lost = False
            self._doing[index] = task, time.monotonic()
            try:
                result = await _answer(submit(self.actors[index]), timeout)
                self.last_answer = time.monotonic()
                return result
            except (*GONE, DeviceError, TimeoutError) as error:
                lost = True
                self._lost(index, task, error, timeout, last=attempt == self.retries)
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
        """Run one task on all actors at once; the result of the first.

        They work on it together: if one is lost, the others wait for it in vain, so all are started
        again before the next try. `prepare` is awaited before each try, while all are free.

        Raises:
            ActorError: as `run`.
        """
        self._start()
        for attempt in range(self.retries + 1):
            await asyncio.sleep(_pause(attempt))
            members = sorted([await self._free(task, others_work=False) for _ in self.actors])
            lost: set[int] = set()
            self._doing |= {index: (task, time.monotonic()) for index in members}
            answers: list[asyncio.Future[Result]] = []
            try:
                submit = await prepare()
                answers += [
                    asyncio.ensure_future(_answer(submit(i, self.actors[i]), timeout))
                    for i in members
                ]
                result = (await _together(answers))[0]
                self.last_answer = time.monotonic()
                return result
            except (*GONE, DeviceError, TimeoutError) as error:
                lost = set(members)
                dead = [i for i, answer in enumerate(answers) if _died(answer)]
                failed = [i for i, answer in enumerate(answers) if _failed(answer)]
                for index in members:
                    if index not in dead:
                        ray.kill(self.actors[index], no_restart=False)
                self._rejoin(members)
                first, last = (failed or [0])[0], attempt == self.retries
                self._note(first, task, error, timeout, last=last)
            except RayError as error:
                found = readable(self.name, task, error)
                if isinstance(found, LostObjectError) and len(members) > 1:
                    lost = set(members)  # those that lack nothing wait for the one that does
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

    def waiting(self) -> list[str]:
        """What every busy actor does, and for how long."""
        now = time.monotonic()
        return [
            f"{self.name}-{index}: {task} ({now - since:.0f} s)"
            for index, (task, since) in self._doing.items()
        ]

    def members(self) -> list[Member]:
        """All actors in order."""
        return [self._member(index) for index in range(len(self.actors))]

    def _member(self, index: int) -> Member:
        name, who = f"{self.name}-{index}", self._who.get(index, "")
        if index in self._doing:
            task, since = self._doing[index]
            return Member(name, "busy", who, task, time.monotonic() - since)
        if index in self._present:
            return Member(name, "idle", who)
        return Member(name, "gone" if index in self._errors else "starting", who)

    def kill(self) -> None:
        """End all actors; their results stay, the driver owns them."""
        for task in self._joining.values():
            task.cancel()
        for actor in self.actors:
            ray.kill(actor)

    # ---- who is there --------------------------------------------------------------------

    def _start(self) -> None:
        if not self._joining:
            self._rejoin(range(len(self.actors)), again=False)

    def _rejoin(self, indices: Sequence[int], *, again: bool = True) -> None:
        for index in indices:
            self._present.discard(index)
            self._joining[index] = asyncio.ensure_future(self._join(index, again=again))
            self._joining[index].add_done_callback(_retrieved)

    async def _join(self, index: int, *, again: bool) -> str:
        """Wait for an actor to start, however long the cluster takes; then it gets work."""
        actor, before = self.actors[index], self._who.get(index) if again else None
        patience = time.monotonic() + _SETTLE_S
        while True:
            try:
                # Unlike a task, this harmless call may wait for and survive a restart. At first it
                # must not: Ray would print a constructor's error at each of its tries.
                retries = -1 if again else 0
                ref = actor.ready.options(max_task_retries=retries).remote()
                answer = await asyncio.wrap_future(ref.future())
                if answer != before or time.monotonic() > patience:
                    break
                await asyncio.sleep(_PAUSE_S)  # the process that is being killed has answered
            except RayError as error:
                found: ActorError | TexForceError
                try:
                    if isinstance(error, GONE) and not again and comes_back(actor):
                        self.budget.spend(f"{self.name}-{index} at its start: {one_line(error, 0)}")
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
        self._who[index] = answer
        self._idle.put_nowait(index)
        return answer

    async def _free(self, task: str, *, others_work: bool = True) -> int:
        """The next free actor; `others_work`: those that are not free will be.

        Raises:
            NobodyLeftError: none is left.
            ActorError: none came back in time.
        """
        while True:
            self.queued += 1
            try:
                index = await asyncio.wait_for(self._idle.get(), self.start_timeout)
            except TimeoutError:
                if self._present and others_work:  # and each of their tasks has a deadline
                    continue
                raise ActorError(
                    f"no {self.name} actor came back within {self.start_timeout:.0f} s for {task} "
                    "(ray.start_timeout_s): is there room on the cluster?"
                ) from None
            finally:
                self.queued -= 1
            if index != _NOBODY:
                return index
            self._idle.put_nowait(_NOBODY)  # for whoever else waits
            raise NobodyLeftError(
                f"no {self.name} actor is left for {task}; the last error: "
                f"{list(self._errors.values())[-1]} (ray.max_restarts)"
            )

    def _lost(self, index: int, task: str, error: Exception, timeout: float, *, last: bool) -> None:
        """An actor died or hangs: it may come back, and its task goes elsewhere meanwhile."""
        if isinstance(error, (TimeoutError, DeviceError)):
            ray.kill(self.actors[index], no_restart=False)
        self._rejoin([index])
        self._note(index, task, error, timeout, last=last)

    def _note(self, index: int, task: str, error: Exception, timeout: float, *, last: bool) -> None:
        who = self._who.get(index, "")
        # What a device said is whole; the log's end would bury it.
        tail = "" if isinstance(error, DeviceError) else log_tail(who)
        cause = f"{one_line(error, timeout)}{advice(self.name, error)}{redacted(tail)}"
        name = f"{self.name}-{index} ({who})" if who else f"{self.name}-{index}"
        self.budget.spend(f"{name} at {task}: {cause}")
        if last:
            raise ActorError(
                f"{name} failed at {task} after {self.retries + 1} tries: {cause}"
            ) from None
        log.warning("%s-%d failed at %s (%s); trying again", self.name, index, task, cause)
        self.restarts += 1


def _pause(attempt: int) -> float:
    """Back-off before a try: none, 0.1 s, 0.2 s, ... at most 10 s."""
    return min(_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S) if attempt else 0.0


async def _answer(refs: Any, timeout: float) -> Result:
    """A call's first result, and the refs of the others.

    Raises:
        DeviceError: the actor's GPU failed; Ray reports it as an error of the task.
    """
    first, *rest = refs if isinstance(refs, Sequence) else [refs]
    try:
        return await asyncio.wait_for(asyncio.wrap_future(first.future()), timeout), tuple(rest)
    except RayTaskError as error:
        if fault := device_fault(error):
            raise fault from None
        raise


async def _together(answers: Sequence[asyncio.Future[Result]]) -> list[Result]:
    """All answers; who lost a peer says so before Ray says who died, and that is the cause."""
    try:
        return await asyncio.gather(*answers)
    except RayTaskError as error:
        if not isinstance(error.cause, PeerLostError):
            raise
        await asyncio.wait(answers, timeout=_SETTLE_S)
        failed = [answer.exception() for answer in answers if _failed(answer)]
        raise (failed[0] if failed and failed[0] else TimeoutError()) from None
    finally:
        for answer in answers:
            answer.cancel()


def _failed(answer: asyncio.Future[Any]) -> bool:
    """The actor is the cause, dead or with a broken device."""
    return _died(answer) or _raised(answer, DeviceError)


def _died(answer: asyncio.Future[Any]) -> bool:
    return _raised(answer, *GONE)


def _raised(answer: asyncio.Future[Any], *kinds: type[BaseException]) -> bool:
    return answer.done() and not answer.cancelled() and isinstance(answer.exception(), kinds)


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Look at a failure, so that asyncio does not print it: it is kept in `_errors`."""
    if not task.cancelled():
        task.exception()


async def gather(*jobs: Any) -> list[Any]:
    """Await all; if one fails, cancel the others, so that none is left running unseen."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
