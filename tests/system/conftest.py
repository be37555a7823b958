"""Whole runs as subprocesses on the embedded pipeline; each is made once and read by many tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SMOKE = (
    "iterations=3",
    "prompts.samples_per_prompt=6",
    "checkpoint.keep_last=10",
    "rewards=[{name: shapes}, {name: jpeg_incompressibility, weight: 0.0}]",
    "eval.every=3",
    "learner.gradient_shards=2",
)


@dataclass(frozen=True)
class Finished:
    directory: Path
    output: str
    code: int

    @property
    def summary(self) -> dict:
        return json.loads(self.output.strip().splitlines()[-1])

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(x) for x in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def samples(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in sorted((self.directory / "samples").iterdir())}

    def adapter(self) -> bytes:
        return (self.directory / "adapter" / "adapter_model.safetensors").read_bytes()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "texforce_ray.run", *arguments]


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments),
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )


def finish(process: subprocess.Popen, directory: Path, timeout: float = 240) -> Finished:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Finished(directory, output, process.returncode)


def run(directory: Path, *overrides: str, config: str = "configs/smoke.yaml") -> Finished:
    arguments = ("--config", config, f"run_dir={directory}", *SMOKE, *overrides)
    finished = finish(start(*arguments), directory)
    assert finished.code == 0, finished.output
    return finished


def kill_after_checkpoint(
    directory: Path, iteration: int, *overrides: str, config: str = "configs/smoke.yaml"
) -> None:
    """Start a run and kill -9 it as soon as the checkpoint of `iteration` is whole."""
    arguments = ("--config", config, f"run_dir={directory}", *SMOKE, *overrides)
    process = start(*arguments)
    marker = directory / "checkpoints" / f"step-{iteration:05d}" / "COMPLETE.json"
    deadline = time.monotonic() + 200
    while not marker.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{marker} never came"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def resume(directory: Path, *overrides: str) -> Finished:
    finished = finish(start("--resume", str(directory), *overrides), directory)
    assert finished.code == 0, finished.output
    return finished


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[None]:
    """A Ray for the module alone: others in this process start theirs otherwise."""
    import ray

    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """k = 0, one rollout actor."""
    end = ("eval.unseen={set: shapes-phrases-unseen}", "eval.guidance_curve=[1, 3]")
    return run(tmp_path_factory.mktemp("plain") / "run", *end, "eval.curve_images=2")


@pytest.fixture(scope="session")
def pipelined(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """k = 1, two rollout actors."""
    overrides = ("max_staleness=1", "rollout.num_workers=2", "rollout.num_cpus=0.25")
    return run(tmp_path_factory.mktemp("pipelined") / "run", *overrides)
