"""A profile that cannot be had costs the profile, not the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from texforce_ray.config_io import make_config
from texforce_ray.profiling import write_profile


def test_a_timeline_that_ray_does_not_give_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def timeline() -> list[Any]:
        raise ConnectionError("the GCS does not answer")

    monkeypatch.setattr(ray, "timeline", timeline)
    batch: Any = SimpleNamespace(iteration=1, rollouts=[SimpleNamespace(trace=b"trace")])
    write_profile(make_config({"profile": [1]}), tmp_path, batch, {"trace": None})
    assert "the GCS does not answer" in caplog.text
    written = [path.name for path in (tmp_path / "profile").iterdir()]
    assert written == ["iteration-00001-rollout.json.gz"]
