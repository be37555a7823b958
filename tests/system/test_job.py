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
            # The default is one fixed port: beside another cluster no job would be taken.
            f"--dashboard-agent-listen-port={free_port()}",
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


def _submit(head: Head, directory: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [
            "bash", "examples/submit_to_cluster.sh", str(directory), "configs/smoke.yaml",
            "iterations=500", "checkpoint.every=1000", "eval.every=0",
        ],
        cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=head.env | {"RAY_API_SERVER_ADDRESS": head.dashboard, "SUBMISSION_ID": "drill"},
    )  # fmt: skip


def test_a_submitted_job_runs_and_ray_job_stop_leaves_a_checkpoint(
    head: Head, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    deadline = time.monotonic() + 200
    submitted = _submit(head, directory)
    while not (directory / "samples" / "iteration-00001.parquet").exists():
        if submitted.poll() is not None:  # a dashboard answers before it can run jobs
            said = submitted.communicate()[0]
            assert "No available agent" in said, said
            submitted = _submit(head, directory)
        assert time.monotonic() < deadline
        time.sleep(1)
    shown = subprocess.run(
        [sys.executable, "-m", "texforce_ray.status", "drill", "--once", "--address",
         head.dashboard],
        cwd=REPO, env=head.env, text=True, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert "job drill: RUNNING" in shown.stdout, shown.stderr
    assert "of 500" in shown.stdout
    assert "rollout-0" in shown.stdout
    head.ray("job", "stop", f"--address={head.dashboard}", "drill")
    assert list((directory / "checkpoints").glob("step-*/COMPLETE.json"))
    logs = head.ray("job", "logs", f"--address={head.dashboard}", "drill", check=False).stdout
    assert f"--resume {directory}" in logs
    # The example follows the job's log to its end.
    assert f"--resume {directory}" in submitted.communicate(timeout=60)[0]
