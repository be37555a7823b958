"""What Ray's errors mean: who is gone, whose device is broken, and one line that says so."""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path
from typing import Any

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

from texforce_ray.errors import (
    ActorError,
    DeviceError,
    LostObjectError,
    TexForceError,
    is_device_fault,
    is_out_of_memory,
    redacted,
)

# Ray's ways of saying that a process is gone: killed, out of memory, its node lost.
GONE = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)

_LOG_LINES = 5
_LOWER = {  # what needs less memory, by role
    "rollout": "rollout.batch_size or rollout.decode_batch_size",
    "learner": "learner.microbatch_size",
}


def readable(name: str, task: str, error: RayError) -> TexForceError:
    """Our own errors as they are; any other as one line with actor, task and cause."""
    cause = _root(error)
    if isinstance(cause, TexForceError) and not isinstance(cause, RayError):
        return cause
    if isinstance(error, ObjectLostError) or isinstance(cause, ObjectLostError):
        return LostObjectError(f"{name} at {task}: a node is gone, and data that it held")
    for ours in TexForceError.__subclasses__():
        # Ray hands a constructor's error over as text.
        marker = f"texforce_ray.errors.{ours.__name__}: "
        text = str(error)
        if marker in text:
            return ours(text.rpartition(marker)[2].split("\n\n")[0].strip())
    return ActorError(f"{name} failed at {task}: {one_line(cause or error, 0)}")


def _root(error: RayError) -> BaseException | None:
    """What was raised in the actor, where Ray could hand it over."""
    cause = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, RayTaskError):
        return getattr(cause, "cause", None) or cause.__cause__ or cause
    return cause


def device_fault(error: RayTaskError) -> DeviceError | None:
    """A task's error, if its actor's GPU is to blame."""
    cause = _root(error)
    if isinstance(cause, DeviceError):
        return cause
    if isinstance(cause, (TexForceError, RayError)):
        return None
    if cause is None:  # its class is not known here
        cause = RuntimeError(_lines(error)[-1] if _lines(error) else "")
    return DeviceError(one_line(cause, 0)) if is_device_fault(cause) else None


def advice(role: str, error: BaseException) -> str:
    """What to lower when a device's memory was too small; `role`: the pool's name."""
    if not (isinstance(error, DeviceError) and is_out_of_memory(error)):
        return ""
    reward = f"batch_size of the reward {role.removeprefix('reward-')!r}"
    return f"; lower {_LOWER.get(role, reward)}"


def comes_back(actor: Any) -> bool:
    """Whether Ray starts an actor again that died; its GPU stays reserved for it."""
    return actor_states(actor_id=actor._actor_id.hex()).get("State") != "DEAD"


def one_line(error: BaseException, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:.0f} s"
    lines = _lines(error)
    if isinstance(error, OutOfMemoryError):
        return "Ray ended it because its node ran out of memory"
    if isinstance(error, GONE):
        return f"the actor died: {lines[-1].strip()}" if lines else "the actor died"
    if isinstance(error, DeviceError):
        return redacted(str(error))
    name = type(error).__name__
    return redacted(f"{name}: {lines[-1].strip()}") if lines else name


def _lines(error: BaseException) -> list[str]:
    return [line for line in str(error).strip().splitlines() if line.strip()]


def log_tail(who: str) -> str:
    """The last lines that an actor wrote to its error log, where that lies on this machine."""
    pid = re.search(r"pid (\d+)", who)
    sessions = Path(tempfile.gettempdir()) / "ray"
    found = sessions.glob(f"session_2*/logs/worker-*-{pid[1]}.err") if pid else ()
    # Numbers of processes come again: the newest session's file is meant.
    for path in sorted(found, key=lambda p: p.parts, reverse=True)[:1]:
        with contextlib.suppress(OSError):
            if lines := path.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]:
                return f" | its last lines: {' / '.join(line.strip() for line in lines)}"
    return ""
