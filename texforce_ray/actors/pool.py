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

    def __init__(self, name: str, actors: Sequence[Any], *, retries: int) -> None:
        self.name, self.actors, self.retries = name, list(actors), retries
        self.restarts = 0
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
            index = await self._idle.get()
            name = f"{self.name}-{index}"
            try:
                refs = submit(self.actors[index])
                first, *rest = refs if isinstance(refs, Sequence) else [refs]
                value = await asyncio.wait_for(asyncio.wrap_future(first.future()), timeout)
                return value, tuple(rest)
            except RayTaskError as error:
                raise _readable(name, task, error) from None
            except (RayActorError, TimeoutError) as error:
                cause = _cause(error, timeout)
                if attempt == self.retries or _start_failed(error):
                    raise ActorError(
                        f"{name} failed at {task} after {attempt + 1} tries: {cause}"
                    ) from None
                log.warning("%s failed at %s (%s); trying again", name, task, cause)
                self.restarts += 1
                if isinstance(error, TimeoutError):
                    ray.kill(self.actors[index], no_restart=False)
            except RayError as error:
                raise ActorError(f"{name} failed at {task}: {_cause(error, timeout)}") from None
            finally:
                self._idle.put_nowait(index)
        raise AssertionError("unreachable")

    async def ready(self, timeout: float) -> list[str]:
        """Wait until every actor has started; each answers who it is.

        Raises:
            ActorError: an actor's constructor failed, or `timeout` seconds went by.
        """
        refs = [actor.ready.remote() for actor in self.actors]
        answers = []
        for index, ref in enumerate(refs):
            name = f"{self.name}-{index}"
            try:
                answers.append(await asyncio.wait_for(asyncio.wrap_future(ref.future()), timeout))
            except TimeoutError:
                raise ActorError(
                    f"{name} did not start within {timeout:.0f} s (ray.start_timeout_s)"
                ) from None
            except RayTaskError as error:
                raise _readable(name, "start", error) from None
            except RayError as error:
                raise _readable(name, "start", error) from None
        return answers

    def kill(self) -> None:
        """End all actors; their results stay, the driver owns them."""
        for actor in self.actors:
            ray.kill(actor)


def _start_failed(error: BaseException) -> bool:
    return "creation task" in str(error)


def _readable(name: str, task: str, error: RayError) -> TexForceError:
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
