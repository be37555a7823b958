"""On a running cluster: joined by address, and through `ray job submit` with `ray job stop`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.conftest import REPO, finish, start

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass(frozen=True)
class Head:
    address: str
    dashboard: str
    env: dict[str, str]

    def ray(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        return subprocess.run(
            [RAY, *arguments], cwd=REPO, env=self.env, text=True, check=check, timeout=280,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A cluster as a user starts it: `ray start --head`, authentication as shipped."""
    port, dashboard = free_port(), free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # No PYTHONPATH: the job must bring the package along in its working directory.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    # Clusters authenticate as shipped; the command line sends its token only when told to.
    env["RAY_AUTH_MODE"] = "token"
    cluster = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", env | {"PATH": path})
    # In a session of its own rather than `ray stop`, which would end every Ray on the machine.
    process = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=4",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
        ],
        cwd=REPO, env=cluster.env, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while cluster.ray("job", "list", f"--address={cluster.dashboard}", check=False).returncode:
        assert process.poll() is None
        assert time.monotonic() < deadline, "the cluster did not start"
        time.sleep(1)
    yield cluster
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_run_joins_a_running_cluster(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    directory = tmp_path / "run"
    finished = finish(
        start(
            "--config", "configs/smoke.yaml", f"run_dir={directory}", "iterations=1",
            f"ray.address={head.address}",
        ),
        directory,
    )  # fmt: skip
    assert finished.code == 0, finished.output
    assert "joined the Ray cluster" in finished.output
    assert finished.summary["run_dir"] == str(directory)


def test_a_submitted_job_runs_and_ray_job_stop_leaves_a_checkpoint(
    head: Head, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    submitted = head.ray(
        "job", "submit", "--no-wait", "--submission-id", "drill", f"--address={head.dashboard}",
        "--working-dir", ".", "--", "python", "-m", "texforce_ray.run", "--config",
        "configs/smoke.yaml", f"run_dir={directory}", "iterations=500", "checkpoint.every=1000",
        "eval.every=0", check=False,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout
    deadline = time.monotonic() + 200
    while not (directory / "samples" / "iteration-00001.parquet").exists():
        logs = head.ray("job", "logs", f"--address={head.dashboard}", "drill", check=False).stdout
        assert "error:" not in logs, logs
        assert time.monotonic() < deadline, logs
        time.sleep(1)
    head.ray("job", "stop", f"--address={head.dashboard}", "drill")
    assert list((directory / "checkpoints").glob("step-*/COMPLETE.json"))
    logs = head.ray("job", "logs", f"--address={head.dashboard}", "drill", check=False).stdout
    assert f"--resume {directory}" in logs
