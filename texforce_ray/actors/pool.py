"""A pool of equal actors: hands out tasks, retries them, restarts who hangs.

A task goes to whichever actor is free; its result does not depend on which that is. Every wait
has a deadline.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from texforce_ray.errors import ActorError, TexForceError

log = logging.getLogger(__name__)

Submit = Callable[[Any], Any]  # calls a method of an actor; gives its ref or refs


class ActorPool:
    """Equal actors behind one `run`: small results are awaited, refs to large ones are kept."""

    def __init__(
        self, name: str, actors: Sequence[Any], *, retries: int, start_timeout: float = 180.0
    ) -> None:
        self.name, self.actors, self.retries = name, list(actors), retries
        self.start_timeout = start_timeout
        self.restarts = 0
        self._dead: set[int] = set()
        self._idle: asyncio.Queue[int] = asyncio.Queue()
        for index in range(len(self.actors)):
            self._idle.put_nowait(index)

    async def run(
        self, task: str, submit: Submit, timeout: float
    ) -> tuple[Any, tuple[ray.ObjectRef, ...]]:
        """Run one task on a free actor.

        Args:
            task: what it is, for error messages.
            submit: calls a method of the actor that it is given; returns the call's refs.
            timeout: seconds for one try.

        Returns:
            The value of the first ref, and the other refs unfetched.

        Raises:
            ActorError: naming actor, task and cause, when the task raised or all tries failed.
        """
        for attempt in range(self.retries + 1):
            index = await self._free(task)
            name, back = f"{self.name}-{index}", True
            try:
                refs = submit(self.actors[index])
                first, *rest = refs if isinstance(refs, Sequence) else [refs]
                value = await asyncio.wait_for(asyncio.wrap_future(first.future()), timeout)
                return value, tuple(rest)
            except (RayActorError, TimeoutError) as error:
                cause = _cause(error, timeout)
                if isinstance(error, TimeoutError):
                    ray.kill(self.actors[index], no_restart=False)
                back = await self._revived(index)
                if attempt == self.retries:
                    raise ActorError(
                        f"{name} failed at {task} after {attempt + 1} tries: {cause}"
                    ) from None
                log.warning("%s failed at %s (%s); trying again", name, task, cause)
                self.restarts += 1
            except RayError as error:
                raise readable(name, task, error) from None
            finally:
                if back:
                    self._idle.put_nowait(index)
        raise AssertionError("unreachable")

    async def _free(self, task: str) -> int:
        """The next free actor.

        Raises:
            ActorError: none is left.
        """
        if len(self._dead) == len(self.actors):
            raise ActorError(
                f"no {self.name} actor is left for {task}: all used up their restarts "
                "(ray.max_restarts)"
            )
        return await self._idle.get()

    async def _revived(self, index: int) -> bool:
        """Wait until Ray has restarted an actor; False if it will not come back.

        Without the wait a task's tries would be over before a restarting actor has imported.
        """
        try:
            await asyncio.wait_for(
                asyncio.wrap_future(self._alive(index).future()), self.start_timeout
            )
        except (RayError, TimeoutError):
            self._dead.add(index)
            return False
        return True

    def _alive(self, index: int) -> ray.ObjectRef:
        # Unlike a task, this harmless call may wait for and survive a restart.
        return self.actors[index].ready.options(max_task_retries=-1).remote()

    async def ready(self, timeout: float) -> list[str]:
        """Wait until every actor has started; each answers who it is.

        Raises:
            ActorError: an actor's constructor failed, or `timeout` seconds went by.
        """
        return await gather(*(self._started(index, timeout) for index in range(len(self.actors))))

    async def _started(self, index: int, timeout: float) -> str:
        name = f"{self.name}-{index}"
        ref = self.actors[index].ready.remote()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(ref.future()), timeout)
        except TimeoutError:
            raise ActorError(
                f"{name} did not start within {timeout:.0f} s (ray.start_timeout_s): no room on "
                "any single node, or slow imports"
            ) from None
        except RayError as error:
            raise readable(name, "start", error) from None

    def kill(self) -> None:
        """End all actors; their results stay, the driver owns them."""
        for actor in self.actors:
            ray.kill(actor)


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


def readable(name: str, task: str, error: RayError) -> TexForceError:
    """Our own errors as they are; any other as one line with actor, task and cause."""
    cause = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, RayTaskError):
        cause = getattr(cause, "cause", None) or cause.__cause__ or cause
    if isinstance(cause, TexForceError) and not isinstance(cause, RayError):
        return cause
    for ours in TexForceError.__subclasses__():
        # Ray hands a constructor's error over as text.
        marker = f"texforce_ray.errors.{ours.__name__}: "
        text = str(error)
        if marker in text:
            return ours(text.rpartition(marker)[2].split("\n\n")[0].strip())
    return ActorError(f"{name} failed at {task}: {_cause(cause or error, 0)}")


def _cause(error: BaseException, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:.0f} s"
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if isinstance(error, RayActorError):
        return f"the actor died: {lines[-1].strip()}" if lines else "the actor died"
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
