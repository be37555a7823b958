"""What Prometheus gets of the present must not depend on when Ray's agent is ready."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from texforce_ray.observability import telemetry


class _Gauge:
    recorded: list[tuple[str, float]]

    def __init__(self, name: str, *given: Any) -> None:
        self.name = name

    def set(self, value: float, labels: Mapping[str, str]) -> None:
        assert labels["run"] == "my run"
        self.recorded.append((self.name, value))


def test_what_never_changes_is_recorded_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Gauge, "recorded", [], raising=False)
    monkeypatch.setattr(telemetry, "Gauge", _Gauge)
    live = telemetry.Telemetry("my run", iterations=20, samples=8)
    _Gauge.recorded.clear()  # lost: the agent was not there yet
    for version in (0, 1):
        live.live(version, {}, {}, {}, 0.5)
    assert _Gauge.recorded.count(("texforce_iterations_planned", 20.0)) == 2
