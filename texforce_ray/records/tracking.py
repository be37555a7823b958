"""Trackers: where an iteration's numbers and the grids go besides the run directory's own files.

All use the same metric names. A tracker that fails never stops a run.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from texforce_ray.config import Config, TrackConfig
from texforce_ray.errors import ConfigError
from texforce_ray.files import atomic_write_text, from_json
from texforce_ray.records.status import State

log = logging.getLogger(__name__)

FILE_NAME = "trackers.json"  # the trackers' IDs for this run, which a resumed run continues


class Tracker(Protocol):
    """Takes what a run reports. `iteration` counts from 0, as in `metrics.jsonl`."""

    def add_scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """All numbers of an iteration; NaN where one is missing."""

    def add_image(self, tag: str, image: NDArray[np.uint8], iteration: int) -> None:
        """An image, uint8 `[H,W,3]`."""

    def close(self, state: State = "finished") -> None:
        """The run has ended with `state`."""


class Guarded:
    """A tracker that never stops a run: its first failure logs a warning and disables it.

    `make` opens the tracker; an exception there counts as a failure too.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        try:
            self._tracker = make()
        except Exception as error:  # third-party code, networks, servers: anything may be raised
            self._give_up(error)

    def add_scalars(self, values: Mapping[str, float], iteration: int) -> None:
        self._attempt(lambda tracker: tracker.add_scalars(values, iteration))

    def add_image(self, tag: str, image: NDArray[np.uint8], iteration: int) -> None:
        self._attempt(lambda tracker: tracker.add_image(tag, image, iteration))

    def close(self, state: State = "finished") -> None:
        """Close it. Safe to call twice."""
        self._attempt(lambda tracker: tracker.close(state))
        self._tracker = None

    def _attempt(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as error:  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._tracker = None
        log.warning(
            "%s: %s: %s; the run continues without it (metrics.jsonl and images/ hold the same)",
            self._name,
            type(error).__name__,
            error,
        )


def check_trackers(track: TrackConfig) -> None:
    """Fail before anything starts if a configured tracker cannot work.

    Raises:
        ConfigError: naming the key and what is missing.
    """
    for key, package in (("wandb", "wandb"), ("mlflow", "mlflow")):
        if getattr(track, key) is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"track.{key}: needs the package {package}: pip install 'texforce-ray[{key}]'"
            )
    if track.wandb is not None and track.wandb.mode == "online":
        from texforce_ray.records.wandb_log import has_key

        if not has_key():
            raise ConfigError(
                "track.wandb: no key for Weights & Biases: export WANDB_API_KEY (under `ray job "
                "submit`, in the runtime environment's env_vars), or set track.wandb.mode=offline"
            )


def open_trackers(config: Config, run_dir: Path) -> list[Guarded]:
    """The configured trackers; in a resumed run, they continue their earlier runs."""
    known = _read(run_dir)

    def remember(name: str, identity: str) -> None:
        known[name] = identity
        atomic_write_text(run_dir / FILE_NAME, json.dumps(known) + "\n")

    found = []
    if (wandb := config.track.wandb) is not None:
        from texforce_ray.records.wandb_log import WandbLog

        def make_wandb() -> Tracker:
            log = WandbLog(wandb, config, run_dir, known.get("wandb"))
            remember("wandb", log.identity)
            return log

        found.append(Guarded("track.wandb", make_wandb))
    if (mlflow := config.track.mlflow) is not None:
        from texforce_ray.records.mlflow_log import MlflowLog

        def make_mlflow() -> Tracker:
            log = MlflowLog(mlflow, config, run_dir, known.get("mlflow"))
            remember("mlflow", log.identity)
            return log

        found.append(Guarded("track.mlflow", make_mlflow))
    return found


def _read(run_dir: Path) -> dict[str, str]:
    path = run_dir / FILE_NAME
    try:
        known = from_json(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s is damaged, so trackers start new runs: %s", path, error)
        return {}
    return {str(name): str(identity) for name, identity in dict(known).items()}
