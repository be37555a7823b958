"""A run of stand-in actors, observed while it runs: endpoint for Prometheus, status.json."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from texforce_ray import status as command
from texforce_ray.records.metric_names import LIVE, METRICS, describe
from texforce_ray.records.status import Status, read_status
from texforce_ray.records.tracking import FILE_NAME as TRACKERS

JOB = Path(__file__).parent / "job.py"
PERIOD_S = 0.05
SERIES = re.compile(r"^(ray_texforce_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass
class Seen:
    """What was seen during the run, and what it left."""

    directory: Path
    families: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=dict)
    text: str = ""
    status: Status | None = None
    code: int = 0
    log: str = ""


def _wait(process: subprocess.Popen, condition: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(PERIOD_S)


def _scrape(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return ""  # not there yet


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    directory = tmp_path_factory.mktemp("live") / "run"
    log = directory.with_suffix(".log")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(JOB), str(directory), str(port), "iterations=1000",
             "profile=[1]", "track.wandb.mode=offline", "track.mlflow={}"],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    found = Seen(directory)
    try:

        def telling() -> bool:
            found.text = _scrape(port)
            return "texforce_eval_drift" in found.text and "texforce_actors" in found.text

        _wait(process, telling, log)
        _wait(process, lambda: (s := read_status(directory)) and s.values["version"] >= 5, log)
        found.status = read_status(directory)
        process.send_signal(signal.SIGTERM)
        found.code = process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    found.log = log.read_text()
    for name, labels, value in SERIES.findall(found.text):
        found.families.setdefault(name, []).append((dict(LABEL.findall(labels)), float(value)))
    return found


def _one(seen: Seen, name: str, **labels: str) -> float:
    values = [v for have, v in seen.families[name] if labels.items() <= have.items()]
    assert len(values) == 1, (name, labels, seen.families[name])
    return values[0]


def test_prometheus_gets_what_happens_and_what_it_means(seen: Seen) -> None:
    assert set(LIVE) <= {name.removeprefix("ray_") for name in seen.families}
    assert _one(seen, "ray_texforce_iterations_planned") == 1000
    assert _one(seen, "ray_texforce_version") >= 4
    assert _one(seen, "ray_texforce_samples_total") >= 4 * 16
    assert 0 < _one(seen, "ray_texforce_samples_per_second") < 16 / 0.3
    assert 0 < _one(seen, "ray_texforce_reward_total_mean") < 1
    assert 0 < _one(seen, "ray_texforce_reward_mean", reward="Brightness") < 1
    assert _one(seen, "ray_texforce_reward_masked_samples") == 0
    assert _one(seen, "ray_texforce_staleness") in (0, 1)
    assert _one(seen, "ray_texforce_seconds", phase="update") >= 0.3
    assert _one(seen, "ray_texforce_restarts", role="rollout") == 0
    assert _one(seen, "ray_texforce_queue_length", role="unscored") <= 3
    states = ("busy", "idle", "starting", "gone")
    assert sum(_one(seen, "ray_texforce_actors", role="rollout", state=s) for s in states) == 2
    assert all(labels["run"] == "run" for group in seen.families.values() for labels, _ in group)
    helped = dict(re.findall(r"^# HELP (ray_texforce_\w+) (.+)$", seen.text, re.MULTILINE))
    assert helped["ray_texforce_staleness"].startswith("versions between")
    assert set(helped) == set(seen.families)


def test_every_metric_of_the_run_is_in_the_table(seen: Seen) -> None:
    lines = (seen.directory / "metrics.jsonl").read_text().splitlines()
    names = {name for line in lines for name in json.loads(line)} - {"iteration"}
    assert len(names) > 30
    assert not {n for n in names if describe(n)[0] not in METRICS}


def test_status_lists_every_actor_and_its_task(seen: Seen) -> None:
    assert seen.status is not None
    values = seen.status.values
    assert (seen.status.state, seen.status.gone) == ("running", "")
    assert values["version"] >= 5
    assert values["samples_per_second"] > 0
    roles = [actor["role"] for actor in values["actors"]]
    assert sorted(roles) == ["learner", "reward-Brightness", "rollout", "rollout"]
    busy = [actor for actor in values["actors"] if actor["state"] == "busy"]
    assert any(re.match(r"sampling iteration \d+, unit \d", a["doing"]) for a in busy)
    assert all(0 <= actor["seconds"] < 30 for actor in busy)


def test_the_last_status_says_how_it_ended(
    seen: Seen, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seen.code == 130, seen.log
    done = len((seen.directory / "metrics.jsonl").read_text().splitlines())
    last = read_status(seen.directory)
    assert last is not None
    assert (last.state, last.gone, last.values["version"]) == ("interrupted", "", done)
    monkeypatch.setenv("COLUMNS", "80")
    assert command.main([str(seen.directory)]) == 0  # ends by itself: the run has
    shown = capsys.readouterr().out
    assert "interrupted" in shown
    assert f"version {done} of 1000" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_trackers_hear_of_the_same_run(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    known = json.loads((seen.directory / TRACKERS).read_text())
    client = MlflowClient(tracking_uri=(seen.directory / "mlflow").as_uri())
    run = client.get_run(known["mlflow"])
    assert run.info.status == "KILLED"  # as MLflow calls it
    lines = [json.loads(x) for x in (seen.directory / "metrics.jsonl").read_text().splitlines()]
    history = client.get_metric_history(known["mlflow"], "reward/total_mean")
    assert [(m.step, m.value) for m in history] == [
        (line["iteration"], line["reward/total_mean"]) for line in lines
    ]
    assert list(seen.directory.glob(f"wandb/offline-run-*/run-{known['wandb']}.wandb"))


def test_the_timeline_holds_the_actors_tasks(seen: Seen) -> None:
    data = gzip.decompress((seen.directory / "profile" / "ray-timeline.json.gz").read_bytes())
    names = [event["name"] for event in json.loads(data)]
    assert names.count("update") >= 1
    assert names.count("sample") >= 4
