"""Awaits Ray's results and interprets its errors: which actor is gone, whose device is broken."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from ray._private.state import actors as actor_states  # no public call without the dashboard
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from texforce_ray import errors
from texforce_ray.errors import (
    ActorError,
    DeviceError,
    LostObjectError,
    TexForceError,
    is_device_fault,
    is_out_of_memory,
    redacted,
)

# Ray's errors for a process that is gone: killed, out of memory, its node lost.
GONE = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)

_T = TypeVar("_T")

_LOG_LINES = 5
_OURS = re.compile(r"texforce_ray\.errors\.(\w+): ")
_LOWER = {  # what to lower to need less memory, by role
    "rollout": "rollout.batch_size or rollout.decode_batch_size",
    "learner": "learner.microbatch_size",
}


def readable(name: str, task: str, error: RayError) -> TexForceError:
    """Our own errors unchanged; any other as one line with actor, task and cause."""
    cause = _root(error)
    if isinstance(cause, TexForceError) and not isinstance(cause, RayError):
        return cause
    if isinstance(error, ObjectLostError) or isinstance(cause, ObjectLostError):
        return LostObjectError(f"{name} at {task}: data was lost with the node that held it")
    if isinstance(error, RayActorError) and (raised := _raised_at_start(str(error))) is not None:
        return raised
    return ActorError(f"{name} failed at {task}: {one_line(cause or error, 0)}")


def _raised_at_start(text: str) -> TexForceError | None:
    """One of our errors, raised by a constructor; Ray passes on only its text."""
    found = list(_OURS.finditer(text))
    kind = getattr(errors, found[-1][1], None) if found else None
    if not (isinstance(kind, type) and issubclass(kind, TexForceError)):
        return None
    return kind(text[found[-1].end() :].split("\n\n", maxsplit=1)[0].strip())


def _root(error: RayError) -> BaseException | None:
    """The exception raised in the actor, if Ray could pass it on."""
    cause = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, RayTaskError):
        return getattr(cause, "cause", None) or cause.__cause__ or cause
    return cause


def device_fault(error: RayTaskError) -> DeviceError | None:
    """A task's error, if its actor's GPU is at fault."""
    cause = _root(error)
    if isinstance(cause, DeviceError):
        return cause
    if isinstance(cause, (TexForceError, RayError)):
        return None
    if cause is None:  # its class is not known here
        cause = RuntimeError(_lines(error)[-1] if _lines(error) else "")
    return DeviceError(one_line(cause, 0)) if is_device_fault(cause) else None


def advice(role: str, error: BaseException) -> str:
    """Which setting to lower if a device ran out of memory; `role`: the pool's name."""
    if not (isinstance(error, DeviceError) and is_out_of_memory(error)):
        return ""
    reward = f"batch_size of the reward {role.removeprefix('reward-')!r}"
    return f"; lower {_LOWER.get(role, reward)}"


def comes_back(actor: Any) -> bool:
    """Whether Ray restarts an actor that died; its GPU stays reserved for it."""
    return actor_states(actor_id=actor._actor_id.hex()).get("State") != "DEAD"


def one_line(error: BaseException, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:.0f} s"
    lines = _lines(error)
    if isinstance(error, OutOfMemoryError):
        return "Ray killed it because its node ran out of memory"
    if isinstance(error, GONE):
        return f"the actor died: {lines[-1].strip()}" if lines else "the actor died"
    if isinstance(error, DeviceError):
        return redacted(str(error))
    name = type(error).__name__
    return redacted(f"{name}: {lines[-1].strip()}") if lines else name


def _lines(error: BaseException) -> list[str]:
    return [line for line in str(error).strip().splitlines() if line.strip()]


def log_tail(pid: int | None) -> str:
    """The last lines of an actor process's error log, if that is on this machine."""
    sessions = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray"
    found = sessions.glob(f"session_2*/logs/worker-*-{pid}.err") if pid else ()
    # Process ids are reused: take the newest session's file.
    for path in sorted(found, key=lambda p: p.parts, reverse=True)[:1]:
        with contextlib.suppress(OSError):
            if lines := path.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]:
                return f" | its last lines: {' / '.join(line.strip() for line in lines)}"
    return ""


def backoff(attempt: int, first: float, longest: float = 10.0) -> float:
    """Seconds to wait before try `attempt`, counted from 0: none, `first`, twice that, ..."""
    return min(first * 2 ** (attempt - 1), longest) if attempt else 0.0


async def gather(*jobs: Any) -> list[Any]:
    """Await all; if one fails, cancel the others, so that none is left running unseen."""
    if len(jobs) == 1:
        return [await jobs[0]]
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


@contextlib.asynccontextmanager
async def beside(job: Coroutine[Any, Any, _T]) -> AsyncIterator[asyncio.Task[_T]]:
    """Run a job beside the block, which may await it; at the end of the block it has ended."""
    task = asyncio.ensure_future(job)
    try:
        yield task
        await task
    finally:
        if not task.done():  # else nothing is awaited: a signal could come between
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
