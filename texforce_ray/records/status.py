"""`status.json`: live run status, written by the driver and read by any process."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from texforce_ray.errors import Interrupted, RunDirectoryError
from texforce_ray.files import from_json, to_json

FILE_NAME = "status.json"
PERIOD_S = 2.0
STALE_S = 30.0  # a driver that is busy with a report or a slow disk may be some seconds late

State: TypeAlias = Literal["starting", "running", "finished", "failed", "interrupted"]
ENDED = ("finished", "failed", "interrupted")

log = logging.getLogger(__name__)


def outcome(error: BaseException | None) -> State:
    """The final state of a run that ended with `error`, or without one."""
    if error is None:
        return "finished"
    return "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"


class StatusFile:
    """Replaces the whole file on each write. It serves readers, not recovery: it is not synced.

    It never stops a run: if the disk is full, only the status is lost.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = Path(run_dir) / FILE_NAME
        self._lock = threading.Lock()  # a slow thread must not overwrite the final status
        self._closed = False

    def write(self, status: Mapping[str, Any], *, last: bool = False) -> None:
        """Write the status; writes after the `last` one are ignored."""
        whole = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": time.time(),
            **status,
        }
        temporary = self._path.with_name(f".{FILE_NAME}.tmp")
        with self._lock:
            if self._closed:
                return
            self._closed = last
            try:
                temporary.write_text(to_json(whole))
                os.replace(temporary, self._path)
            except OSError as error:
                log.debug("cannot write %s: %s", self._path, error)


@dataclass(frozen=True)
class Status:
    """The file's content, and whether its driver is still running.

    age: seconds since it was written; gone: why its driver seems to have stopped, or "".
    """

    values: dict[str, Any]
    age: float
    gone: str

    @property
    def state(self) -> str:
        return str(self.values.get("state", "unknown"))


def read_status(run_dir: Path) -> Status | None:
    """The run's status; None where there is no file (yet).

    Raises:
        RunDirectoryError: not a run, or the file cannot be read.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.parent.is_dir():
        raise RunDirectoryError(f"{run_dir} is not a run: there is no such directory")
    try:
        values = from_json(path.read_text())
        written = float(values["time"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{path} is not a run's status: {error}") from None
    age = max(0.0, time.time() - written)
    return Status(values, age, _gone(values, age))


def _gone(values: Mapping[str, Any], age: float) -> str:
    """Why the driver seems to have stopped although its run has not ended; or ""."""
    if values.get("state") in ENDED:
        return ""
    driver = f"its driver (pid {values.get('pid')} on {values.get('host')})"
    if values.get("host") == socket.gethostname() and not _alive(values.get("pid")):
        return f"{driver} exited without writing a final status"
    return f"{driver} has not written for {age:.0f} s" if age > STALE_S else ""


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
