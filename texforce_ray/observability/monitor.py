"""Publishes live run status every two seconds: `status.json` and Prometheus."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from texforce_ray.config import Config
from texforce_ray.crew.crew import Crew
from texforce_ray.observability.telemetry import Telemetry
from texforce_ray.records.run_directory import RunDirectory
from texforce_ray.records.status import PERIOD_S, State, StatusFile, outcome

_ERRORS = 5  # how many are kept
_LONGEST = 500  # characters kept of each


class Monitor:
    """A context manager around a run's work, within a running event loop; also a tracker.

    It reads only what the driver already knows and queries no actor. Errors are the package's own
    warnings, and the one that ends the run.

    Args:
        config: of the run.
        directory: where the file goes, and whose metrics are tracked.
        start: iterations already done.
    """

    def __init__(self, config: Config, directory: RunDirectory, start: int) -> None:
        self.crew: Crew | None = None
        self._file = StatusFile(directory.path)
        self._telemetry = Telemetry(
            directory.path.name, config.iterations, config.samples_per_iteration
        )
        directory.metrics.trackers += [self._telemetry, self]
        self._errors = _Errors()
        self._version = start
        self._facts: dict[str, Any] = {
            "run_dir": str(directory.path),
            "started": time.time(),
            "iterations": config.iterations,
            "unscored_limit": config.rollout.unscored_units,
            "reward": None,
            "samples_per_second": None,
        }

    def follow(self, crew: Crew) -> None:
        """Report on these actors from now on."""
        self.crew = crew

    def __enter__(self) -> Monitor:
        logging.getLogger("texforce_ray").addHandler(self._errors)
        self._file.write(self._status("starting"))
        self._task = asyncio.ensure_future(self._keep_publishing())
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._task.cancel()
        logging.getLogger("texforce_ray").removeHandler(self._errors)
        state = outcome(error)
        if error is not None and state == "failed":
            self._errors.add(f"{type(error).__name__}: {error}")
        self._file.write(self._status(state), last=True)

    async def _keep_publishing(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            status = self._look()
            # In a thread: a slow disk would hold up the actors.
            await asyncio.to_thread(self._file.write, status)

    def _look(self) -> dict[str, Any]:
        crew = self.crew
        if crew is None:
            return self._status("starting")
        members, queues = crew.members(), crew.queues()
        restarts = {pool.name: pool.restarts for pool in crew.pools()}
        self._telemetry.live(self._version, members, queues, restarts, crew.silence())
        actors = [
            {
                "role": role,
                "node": member.where.node if member.where else "",
                "name": member.name,
                "state": member.state,
                "process": str(member.where or ""),
                "doing": member.doing,
                "seconds": member.seconds,
            }
            for role, group in members.items()
            for member in group
        ]
        at_work = any(actor["state"] == "busy" for actor in actors) or self._version
        state: State = "running" if at_work else "starting"
        return self._status(state) | {"actors": actors, "queues": queues}

    def _status(self, state: State) -> dict[str, Any]:
        restarts = self.crew.restarts if self.crew else 0
        return {
            "state": state,
            "version": self._version,
            "restarts": restarts,
            **self._facts,
            "errors": list(self._errors.last),
        }

    # ---- as a tracker --------------------------------------------------------------------

    def add_scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Note that an iteration is done."""
        self._version = iteration + 1
        self._facts["reward"] = values.get("reward/total_mean")
        self._facts["samples_per_second"] = values.get("samples_per_second")

    def add_image(self, tag: str, image: NDArray[np.uint8], iteration: int) -> None:
        """Images are not part of the status."""

    def close(self, state: State = "finished") -> None:
        """Nothing to do: `__exit__` writes how the run ended."""


class _Errors(logging.Handler):
    """The package's last warnings, with their times."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last: deque[dict[str, Any]] = deque(maxlen=_ERRORS)

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage(), record.created)

    def add(self, text: str, when: float | None = None) -> None:
        self.last.append({"time": when or time.time(), "text": text[:_LONGEST]})
