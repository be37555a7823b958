"""`RUN_DIR/profile/`: a Ray timeline and torch profiles of the iterations that `profile` names."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from texforce_ray.collect import ScoredBatch
from texforce_ray.config import Config
from texforce_ray.errors import RunDirectoryError
from texforce_ray.records.files import atomic_write_bytes

log = logging.getLogger(__name__)


def write_profile(
    config: Config, run_dir: Path, batch: ScoredBatch, update: Mapping[str, Any]
) -> None:
    """Write what the actors recorded of an iteration, if it is one of those; wait for Ray's part.

    Ray's timeline is written after the last of them: it holds everything until then. A full disk
    or a cluster that does not answer costs the profile, not the run.
    """
    if batch.iteration not in config.profile:
        return
    folder, name = run_dir / "profile", f"iteration-{batch.iteration:05d}"
    traces = [("rollout", info.trace) for info in batch.rollouts]
    traces.append(("learner", update.get("trace")))
    try:
        for who, data in traces:
            if data is not None:
                atomic_write_bytes(folder / f"{name}-{who}.json.gz", data)
        if batch.iteration == max(config.profile) and (timeline := _timeline()) is not None:
            atomic_write_bytes(folder / "ray-timeline.json.gz", timeline)
    except RunDirectoryError as error:
        log.warning("the profile is not whole: %s", error)


def _timeline() -> bytes | None:
    """What every worker of the cluster did and when, as a Chrome trace; None if Ray has none."""
    quiet = logging.getLogger("ray._private.state")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it announces how it will work in a later version
    try:
        return gzip.compress(json.dumps(ray.timeline()).encode())
    except Exception as error:  # Ray's own, gRPC's: a run of days does not end for a profile
        log.warning("the profile has no ray-timeline.json.gz: %s: %s", type(error).__name__, error)
        return None
    finally:
        quiet.setLevel(level)
