"""Detects another machine's driver that still writes a run directory, where locks may not help.

`flock` is local on many network file systems. But a driver replaces `status.json` every two
seconds, which every machine sees.
"""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path

from texforce_ray.errors import RunDirectoryError
from texforce_ray.records.status import ENDED, FILE_NAME, PERIOD_S, STALE_S, Status, read_status

log = logging.getLogger(__name__)

_LOOK_S = 0.2
_OLD_S = 600.0  # more than any clock difference: an older file is no longer written


def check_exclusive(run_dir: Path) -> None:
    """Raise if another host's driver is still writing `run_dir`.

    Returns at once if that driver recorded that it ended, or has long been silent. Otherwise waits
    up to half a minute for its next write: the clocks of two hosts may differ, so the file's age
    alone cannot tell a driver that was just killed from one at work.

    Raises:
        RunDirectoryError: it is being written; names host and process.
    """
    first = _status(run_dir)
    if first is None or first.state in ENDED or first.age > _OLD_S:
        return
    host, pid = first.values.get("host"), first.values.get("pid")
    if host == socket.gethostname():  # the lock decides
        return
    patience = max(3 * PERIOD_S, STALE_S - first.age)
    log.warning(
        "%s was last written by a driver on %s (pid %s), which has not recorded that it ended; "
        "watching for up to %.0f s whether it still writes",
        run_dir,
        host,
        pid,
        patience,
    )
    until = time.monotonic() + patience
    while time.monotonic() < until:
        time.sleep(_LOOK_S)
        now = _status(run_dir)
        if now is None or now.state in ENDED:
            return
        if now.values.get("time") != first.values.get("time"):
            raise RunDirectoryError(
                f"{run_dir} is being written by a run on {now.values.get('host')} (pid "
                f"{now.values.get('pid')}): its {FILE_NAME} changed just now; stop that run "
                f"first, or choose another run_dir; if there is no such process, delete "
                f"{run_dir / FILE_NAME} and try again"
            )


def _status(run_dir: Path) -> Status | None:
    try:
        return read_status(run_dir)
    except RunDirectoryError:  # damaged: it gives no information
        return None
