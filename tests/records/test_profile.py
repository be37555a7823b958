"""A profile that cannot be had costs the profile, not the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from texforce_ray.config.io import make_config
from texforce_ray.observability.profiling import write_profile


def test_a_timeline_that_ray_does_not_give_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def timeline() -> list[Any]:
        raise ConnectionError("the GCS does not answer")

    monkeypatch.setattr(ray, "timeline", timeline)
    traces = [("rollout", b"trace"), ("learner", None)]
    write_profile(make_config({"profile": [1]}), tmp_path, 1, traces)
    assert "the GCS does not answer" in caplog.text
    written = [path.name for path in (tmp_path / "profile").iterdir()]
    assert written == ["iteration-00001-rollout.json.gz"]
