"""`RUN_DIR/profile/`: a Ray timeline and torch profiles of the iterations that `profile` names."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import ray

from texforce_ray.config import Config
from texforce_ray.errors import RunDirectoryError
from texforce_ray.files import atomic_write_bytes

log = logging.getLogger(__name__)


def write_profile(
    config: Config, run_dir: Path, iteration: int, traces: Sequence[tuple[str, bytes | None]]
) -> None:
    """Write an iteration's traces (role, data) if it is one of those to profile.

    Ray's timeline is written after the last of them: it covers everything until then. A full disk
    or an unresponsive cluster costs the profile, not the run.
    """
    if iteration not in config.profile:
        return
    folder, name = run_dir / "profile", f"iteration-{iteration:05d}"
    try:
        for role, data in traces:
            if data is not None:
                atomic_write_bytes(folder / f"{name}-{role}.json.gz", data)
        if iteration == max(config.profile) and (timeline := _timeline()) is not None:
            atomic_write_bytes(folder / "ray-timeline.json.gz", timeline)
    except RunDirectoryError as error:
        log.warning("the profile is incomplete: %s", error)


def _timeline() -> bytes | None:
    """What every worker of the cluster did and when, as a Chrome trace; None if Ray has none."""
    quiet = logging.getLogger("ray._private.state")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it announces changes in later versions
    try:
        return gzip.compress(json.dumps(ray.timeline()).encode())
    except Exception as error:  # Ray's or gRPC's: a profile must not end a run of days
        log.warning("the profile has no ray-timeline.json.gz: %s: %s", type(error).__name__, error)
        return None
    finally:
        quiet.setLevel(level)
