"""A cluster of several raylets: a node joins in the middle and takes work, a node leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.rays import REPO, Rays, rays
from texforce_ray.testing import stand_ins

DRAWING = "ray::RolloutActor.sample"  # a worker's command line while it does that


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rays]:
    """A head for the driver, as a user starts it."""
    with rays(tmp_path_factory.mktemp("rays")) as cluster:
        cluster.start_head(
            "--num-cpus=2", '--resources={"home": 1}', "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={cluster.dashboard_port}",
        )  # fmt: skip
        cluster.await_head()
        yield cluster


def await_true(what: Callable[[], object], otherwise: Callable[[], str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.02)


def finish(job: subprocess.Popen, seconds: float) -> str:
    """Its output; it is killed if it does not end."""
    try:
        return job.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        job.kill()
        return job.communicate()[0]


def test_a_dry_run_looks_at_the_cluster_and_fits(home: Rays) -> None:
    def dry_run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [
                sys.executable, "-m", "texforce_ray.run", "--config", "configs/smoke.yaml",
                "--dry-run", f"ray.address={home.address}", "rollout.num_workers=9", *arguments,
            ],
            cwd=REPO, env=home.env, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    short = dry_run("rollout.num_gpus=1", "rollout.min_workers=9")
    assert short.returncode == 0, short.stderr
    assert "does not fit: this needs 5.1 CPU, 9 GPU; the cluster at " in short.stdout
    assert "has 2 CPU, 0 GPU on 1 node" in short.stdout
    assert "autoscaler is running" not in short.stdout  # a head reports without one too
    taken = dry_run("placement.rollout=home", "--fit")
    assert taken.returncode == 0, taken.stderr
    assert "--fit: rollout.num_workers 9 -> 2" in taken.stderr
    assert "fits: the cluster at " in taken.stdout
    assert "num_workers: 2" in taken.stdout


@pytest.mark.timeout(240)
def test_a_submitted_job_takes_a_node_that_joins_and_outlives_one_that_leaves(
    home: Rays, tmp_path: Path
) -> None:
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    first = home.add_node("--num-cpus=1", '--resources={"rollout": 1}', apart=True)
    submit = (
        "job", "submit", "--no-wait", "--submission-id", "nodes", f"--address={home.dashboard}",
        "--working-dir", ".", "--runtime-env-json",
        '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}', "--",
        "python", "-m", "texforce_ray.run", "--config", "configs/smoke.yaml",
        f"run_dir={run_dir}", "iterations=6", "eval.every=0", "ray.resource_timeout_s=60",
        "placement.rollout=rollout", "placement.learner=home", "placement.reward=home",
        "rollout.num_workers=2", "rollout.min_workers=1", "rollout.num_cpus=1",
        f"rewards=[{{name: shapes}}, {{target: 'tests.cluster.gate:Gate', weight: 0.0, "
        f"kwargs: {{path: {gate}}}}}]",
    )  # fmt: skip

    def logs() -> str:
        return home.ray("job", "logs", f"--address={home.dashboard}", "nodes", check=False)

    said: list[str] = []

    def submitted() -> bool:  # once the dashboard answers
        said.append(home.ray(*submit, check=False))
        return "submitted successfully" in said[-1]

    home.await_agent()
    await_true(submitted, lambda: said[-1], 60)
    await_true(lambda: first.runs(DRAWING), logs, 90)
    second = home.add_node("--num-cpus=1", '--resources={"rollout": 1}', apart=True)
    # Its actor has been made: what is drawn from now on is drawn by two.
    await_true(lambda: second.runs("ray::RolloutActor"), logs, 60)
    await_true(lambda: not second.runs("ray::RolloutActor.__init__"), logs, 60)
    gate.touch()
    await_true(lambda: second.runs(DRAWING), logs, 60)
    await_true(lambda: first.runs(DRAWING), logs, 60)
    first.kill()
    # Asking Ray for logs takes seconds of CPU: only when the run has ended.
    await_true((run_dir / "report.html").exists, logs, 90)
    await_true(lambda: '"seconds":' in logs(), logs, 30)

    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(6))
    assert lines[-1]["actors/restarts"] >= 1
    assert all(line["reward/masked"] == 0 for line in lines)
    assert (run_dir / "adapter" / "adapter_model.safetensors").exists()
    second.end()


@pytest.mark.slow
def test_learners_are_packed_and_start_again_where_there_is_room(
    home: Rays, tmp_path: Path
) -> None:
    nodes = [home.add_node("--num-cpus=2", '--resources={"learner": 1}') for _ in range(2)]
    trace = tmp_path / "trace"
    job = subprocess.Popen(
        [
            sys.executable, "tests/cluster/job.py", str(tmp_path / "run"), home.address, str(trace),
            "0.2", "rollout.num_cpus=0", "placement.rollout=home", "placement.learner=learner",
            "learner.num_workers=2", "learner.gradient_shards=2", "learner.num_cpus=1",
            "iterations=4", "ray.resource_timeout_s=60",
        ],
        cwd=REPO, env=home.env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def learners() -> set[int]:
        return {note["pid"] for note in stand_ins.read_trace(trace) if note["what"] == "update"}

    await_true(lambda: len(learners()) == 2 or job.poll() is not None, lambda: "no update", 60)
    before = learners()
    (holds,) = [node for node in nodes if before & set(node.processes())]
    assert before <= set(holds.processes())  # both: packed
    holds.kill()
    output = finish(job, 60)
    assert job.returncode == 0, output
    assert len(learners() - before) == 2
