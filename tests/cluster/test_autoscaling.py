"""A run on a cluster that grows: starts with the nodes that are there, takes more, lets them go."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.rays import REPO, Rays, rays, scaling_head
from texforce_ray.testing import stand_ins

# What is asked of the cluster is asked in a process of its own: whether Ray authenticates is
# settled when a process first imports it.
LOOK = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
from ray.experimental.internal_kv import _internal_kv_get
from texforce_ray.cluster.autoscaling import at_work
print(json.dumps({
    "nodes": sum(node["Alive"] for node in ray.nodes()),
    "at_work": at_work(),
    "request": json.loads(_internal_kv_get("autoscaler_resource_request") or "null"),
}))
"""


def look(cluster: Rays) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", LOOK, cluster.address],
        cwd=REPO, env=cluster.env, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def start(cluster: Rays, run_dir: Path, *arguments: str) -> subprocess.Popen:
    job = [sys.executable, "tests/cluster/job.py", str(run_dir), cluster.address, *arguments]
    return subprocess.Popen(
        job, cwd=REPO, env=cluster.env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def samplers(trace: Path) -> set[int]:
    return {note["pid"] for note in stand_ins.read_trace(trace) if note["what"] == "sample"}


def await_true(
    what: Callable[[], bool], job: subprocess.Popen | None = None, patience: float = 60
) -> None:
    deadline = time.monotonic() + patience
    while not what():
        assert job is None or job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rays]:
    """A head with room for one rollout actor; up to two nodes more of that size."""
    with rays(tmp_path_factory.mktemp("rays")) as cluster:
        scaling_head(cluster, {"CPU": 1}, {"CPU": 1, "rollout": 1}, most=2)
        cluster.await_head()
        await_true(lambda: look(cluster)["at_work"])  # from its first report on
        yield cluster


def test_a_run_starts_small_grows_and_lets_the_nodes_go(growing: Rays, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    resume = growing.nodes[0].pause(
        "autoscaler/_private/monitor.py"
    )  # or the nodes might be there before the actors
    job = start(
        growing, tmp_path / "run", str(trace), "0.3",
        "rollout.num_workers=3", "rollout.min_workers=1", "iterations=500",
    )  # fmt: skip
    await_true(lambda: len(stand_ins.read_trace(trace)) > 2, job)
    assert len(samplers(trace)) == 1
    resume()
    # Awaited, not timed: two nodes and their actors have to start.
    await_true(lambda: len(samplers(trace)) == 3, job, patience=150)
    job.terminate()
    output, _ = job.communicate(timeout=100)
    assert "stopped after" in output
    assert "asked the cluster's autoscaler for 3 x rollout (1 CPU each)" in output
    assert look(growing)["request"] == []
    await_true(lambda: look(growing)["nodes"] == 1)


@pytest.mark.slow
def test_a_run_waits_for_nodes_that_only_the_autoscaler_has(growing: Rays, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    job = start(
        growing, tmp_path / "run", str(trace), "0",
        "rollout.num_workers=2", "placement.rollout=rollout", "iterations=1",
        "ray.resource_timeout_s=0.1",
    )  # fmt: skip
    output, _ = job.communicate(timeout=100)
    assert job.returncode == 0, output
    assert "2 x rollout (1 CPU, 0.001 rollout each)" in output


def test_a_run_for_which_no_room_comes_says_so_and_takes_its_request_back(
    growing: Rays, tmp_path: Path
) -> None:
    job = start(
        growing, tmp_path / "run", str(tmp_path / "trace"), "0",
        "rollout.resources={moon: 1}", "ray.autoscale_timeout_s=3",
    )  # fmt: skip
    output, _ = job.communicate(timeout=100)
    assert job.returncode == 1, output
    assert "no single node is large enough for 1 x rollout (1 CPU, 1 moon each)" in output
    assert "ray.autoscale_timeout_s" in output
    assert look(growing)["request"] == []
