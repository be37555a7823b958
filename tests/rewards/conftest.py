"""Environments of rewards, built once for the session, and scripts run inside them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from texforce_ray.rewards.isolation import Environment, build, default_root

REPO = Path(__file__).parents[2]
RunInside = Callable[..., dict]


@pytest.fixture(scope="session")
def run_inside(tmp_path_factory: pytest.TempPathFactory) -> RunInside:
    """`run_inside(set, script, *arguments)`: the last line that it prints, as JSON."""

    def run(packages: str, script: str, *arguments: str) -> dict:
        python = build(Environment.of_set(packages), default_root(), 600, print)
        done = subprocess.run(
            [python, "-m", f"tests.rewards.isolated.{script}", *arguments],
            cwd=tmp_path_factory.mktemp(script),
            env=os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
