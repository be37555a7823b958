"""One run, made by the example that trains from Python with the example's own reward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import REPO

SMALL = (
    "iterations=2",
    "diffusion.steps=4",
    "prompts.per_iteration=2",
    "prompts.samples_per_prompt=4",
    "rollout.num_workers=1",
    "rollout.batch_size=4",
    "learner.colocated=true",  # one process less that imports torch
    "optimizer.lr=0.05",
    "optimizer.schedule=constant",
    "update.minibatches=2",
    "learner.num_threads=1",
    "eval.every=0",
    "eval.final_images=0",
    "ray.start_timeout_s=280",
)


@pytest.fixture(scope="session")
def trained_output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory, and what the example printed."""
    directory = tmp_path_factory.mktemp("example") / "run"
    done = subprocess.run(
        [
            sys.executable, "examples/train_from_python.py", "examples/custom_reward.yaml",
            f"run_dir={directory}", *SMALL,
        ],
        cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO), "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return directory, done.stdout


@pytest.fixture(scope="session")
def trained(trained_output: tuple[Path, str]) -> Path:
    return trained_output[0]
