"""Which cluster is joined, and what would keep one from starting; none is started here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.runtime_env.runtime_env import _merge_runtime_env

import texforce_ray
from texforce_ray.cluster import connection
from texforce_ray.cluster.plan import look
from texforce_ray.config.io import load_config, make_config
from texforce_ray.driver.inputs import check_inputs
from texforce_ray.errors import ResourceError
from texforce_ray.observability import telemetry

ISOLATED = {"rewards": [{"name": "face"}]}


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of ray.init, which do nothing."""
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        override = os.environ.get("RAY_OVERRIDE_JOB_RUNTIME_ENV") == "1"
        calls.append({**options, "override": override})

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_OVERRIDE_JOB_RUNTIME_ENV"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize("value", ["", " ", "local"])
def test_an_empty_ray_address_is_none_in_dry_run_and_run(
    value: str, monkeypatch: pytest.MonkeyPatch, started: list[dict[str, Any]]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    config = make_config({})
    assert look(config).name == "this machine"
    assert connection.connect(config)
    assert started[0]["address"] == "local"


@pytest.mark.parametrize("override", ["ray.address=null", "ray.address=auto"])
def test_a_stale_ray_address_is_named(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ResourceError, match=r"^RAY_ADDRESS: no Ray cluster at.*unset it"):
        connection.connect(load_config(None, [override]))
    with pytest.raises(ResourceError, match=r"^ray\.address: no Ray cluster at '127\.0\.0\.1:2'"):
        connection.connect(load_config(None, ["ray.address=127.0.0.1:2"]))


def test_modules_of_the_job_and_of_isolated_rewards_go_together(
    monkeypatch: pytest.MonkeyPatch, started: list[dict[str, Any]]
) -> None:
    job = {"py_modules": ["gcs://mine.zip"], "working_dir": "gcs://dir.zip"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": job}))
    connection.connect(make_config(ISOLATED))
    ours, override = started[0]["runtime_env"], started[0]["override"]
    assert _merge_runtime_env(job, ours, override=override) == {
        "py_modules": ["gcs://mine.zip", str(Path(texforce_ray.__file__).parent)],
        "working_dir": "gcs://dir.zip",
    }
    assert "RAY_OVERRIDE_JOB_RUNTIME_ENV" not in os.environ
    connection.connect(make_config({}))
    assert not started[1]["override"]


def test_what_ray_refuses_is_not_called_a_missing_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise ray.exceptions.RuntimeEnvSetupError("py_modules is too large")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ResourceError, match=r"runtime environment: [\s\S]*too large") as caught:
        connection.connect(make_config(ISOLATED))
    assert "no Ray cluster" not in str(caught.value)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_ray_cannot_use_is_named_before_anything_starts(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    (tmp_path / "file").write_text("")
    cases = {
        "/tmp/" + "x" * 60: r"bytes too long",
        str(tmp_path / "file"): r"not a folder that this user can write to",
        "relative": r"not an absolute path",
        "": r"not an absolute path",
    }
    for folder, problem in cases.items():
        # pytest's own folders may be too long already.
        monkeypatch.setattr(connection, "_SOCKET_BYTES", 107 if "xxx" in folder else 1000)
        monkeypatch.setenv(variable, folder)
        with pytest.raises(ResourceError, match=rf"^{variable}: .*{problem}"):
            check_inputs(make_config({}))
        with pytest.raises(ResourceError):
            connection.connect(make_config({}))
    assert not started
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_inputs(make_config({}))
    check_inputs(make_config({"ray": {"address": "1.2.3.4:1"}}))  # its folders are elsewhere


def test_labels_reach_ray_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    record = telemetry.Gauge.set

    def set_(gauge: Any, value: float, tags: dict[str, str]) -> None:
        record(gauge, value, tags)  # raises UnicodeEncodeError for anything else
        seen.append(tags)

    monkeypatch.setattr(telemetry.Gauge, "set", set_)
    exported = telemetry.Telemetry("läufe/a b", 3, 4)
    exported.add_scalars({"reward/schön_mean": 1.0, "reward/total_mean": 2.0}, 0)
    exported.live(1, {}, {"reward-schön": 1}, {}, 0.5)
    assert all(tags["run"] == "l%C3%A4ufe/a b" for tags in seen)
    assert {"reward-sch%C3%B6n"} == {tags["role"] for tags in seen if "role" in tags}
