"""A run's numbers for Prometheus, through Ray: every node of a cluster has an endpoint for them.

Ray prefixes each name with `ray_`. The table is `records/metric_names.py`. Recording a number takes
microseconds; Ray's own agent forwards it.
"""

from __future__ import annotations

import string
from collections import Counter as Count
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from ray.util.metrics import Counter, Gauge

from texforce_ray.records.metric_names import LIVE, describe
from texforce_ray.records.status import State

if TYPE_CHECKING:
    from texforce_ray.crew.member import Member

_STATES = ("busy", "idle", "starting", "gone")


class Telemetry:
    """A tracker for Prometheus; `live` also reports what happens within an iteration.

    Args:
        run: value of the label `run`.
        iterations: of the whole run.
        samples: in each iteration.
    """

    def __init__(self, run: str, iterations: int, samples: int) -> None:
        self._run, self._samples, self._iterations = {"run": _ascii(run)}, samples, iterations
        self._gauges: dict[str, Gauge] = {}
        self._phases: set[str] = set()
        self._total = Counter("texforce_samples_total", LIVE["texforce_samples_total"][0], ("run",))

    def add_scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Record an iteration's numbers; one that is not finite keeps its last value."""
        # A phase that this iteration does not have, such as evaluation, took no time.
        self._phases |= {name for name in values if name.startswith(("seconds/", "share/"))}
        for name, value in [*dict.fromkeys(self._phases, 0.0).items(), *values.items()]:
            if np.isfinite(value):
                metric, labels = describe(name)
                self._set(metric.prometheus, metric.meaning, value, labels)
        self._total.inc(self._samples, self._run)
        self._live("texforce_version", iteration + 1)

    def add_image(self, tag: str, image: NDArray[np.uint8], iteration: int) -> None:
        """Nothing to do: Prometheus takes only numbers."""

    def close(self, state: State = "finished") -> None:
        """Nothing to do: Ray drops the numbers of a process that has ended."""

    def live(
        self,
        version: int,
        members: Mapping[str, Sequence[Member]],
        queues: Mapping[str, int],
        restarts: Mapping[str, int],
        silence: float,
    ) -> None:
        """Record the present: actors, queues and restarts by role, seconds without a result."""
        # Each time: what is set only once is lost if Ray's agent is not ready yet.
        self._live("texforce_iterations_planned", self._iterations)
        self._live("texforce_version", version)
        self._live("texforce_seconds_since_result", silence)
        for role, actors in members.items():
            states = Count(actor.state for actor in actors)
            for state in _STATES:
                self._live("texforce_actors", states[state], role=role, state=state)
        for role, length in queues.items():
            self._live("texforce_queue_length", length, role=role)
        for role, count in restarts.items():
            self._live("texforce_restarts", count, role=role)

    def _live(self, name: str, value: float, **labels: str) -> None:
        self._set(name, LIVE[name][0], value, labels)

    def _set(self, name: str, meaning: str, value: float, labels: Mapping[str, str]) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, meaning, ("run", *labels))
        safe = {key: _ascii(text) for key, text in labels.items()}
        self._gauges[name].set(float(value), {**self._run, **safe})


def _ascii(text: str) -> str:
    """A label's value as Ray accepts it: other characters percent-encoded, as in URLs."""
    return quote(text, safe=string.punctuation + " ")
