"""What a run does at the same time: training and writing, evaluations and sampling."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in_run import EACH, SMALL
from tests.system.rewards import CountingServer
from texforce_ray.config.io import make_config
from texforce_ray.driver import evaluation, recorder
from texforce_ray.driver.training import train
from texforce_ray.records.checkpoint import checkpoints, step_of
from texforce_ray.records.metrics import read_metrics
from texforce_ray.testing import stand_ins

pytestmark = pytest.mark.usefixtures("small_cluster")


def _config(folder: Path, **changes: Any) -> Any:
    base = {
        "run_dir": str(folder / "run"),
        "iterations": 4,
        "rollout": {"num_workers": 2, "batch_size": 4, **EACH},
        "learner": EACH,
        "rewards": [{"target": stand_ins.REWARD, "num_cpus": 0}],
        "eval": {"every": 0, "final_images": 0},
        "checkpoint": {"keep_last": 9},
    }
    return make_config(SMALL | base | changes)


def _roles(folder: Path, **times: float) -> Any:
    small = {"latent_shape": (4, 8, 8), "image_size": 16}
    return stand_ins.roles(stand_ins.Settings(trace=str(folder / "trace"), **small, **times))


def test_the_next_update_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, waited = recorder.save_checkpoint, []

    def slow(path: Path, state: Any) -> Any:
        version, deadline = state.iteration, time.monotonic() + 20
        while version < 4 and time.monotonic() < deadline:
            notes = stand_ins.read_trace(tmp_path / "trace")
            if any(n["what"] == "update" and n["version"] > version for n in notes):
                waited.append(version)
                break
            time.sleep(0.01)
        return write(path, state)

    monkeypatch.setattr(recorder, "save_checkpoint", slow)
    train(_config(tmp_path), roles=_roles(tmp_path))
    assert waited == [1, 2, 3]
    assert gc.get_freeze_count() == 0  # a notebook's objects are collected again
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]
    assert sorted(step_of(path) for path in checkpoints(tmp_path / "run")) == [1, 2, 3, 4]


def test_sampling_goes_on_while_an_evaluation_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all but a few actors of a large cluster would wait at every evaluation."""
    score, seen = evaluation.score, []

    async def patient(*given: Any) -> Any:
        for _ in range(100):
            notes = stand_ins.read_trace(tmp_path / "trace")
            updates = [note for note in notes if note["what"] == "update"]
            if len(updates) == 1 and any(note.get("iteration") == 1 for note in notes):
                seen.append("iteration 1, while version 1 is evaluated")
                break
            await asyncio.sleep(0.01)
        return await score(*given)

    config = _config(
        tmp_path, iterations=2, eval={"every": 1, "images": 4, "grid": 1, "final_images": 0}
    )
    monkeypatch.setattr(evaluation, "score", patient)
    train(config, roles=_roles(tmp_path))
    assert len(seen) == 1


def test_units_of_a_quick_reward_share_calls(tmp_path: Path) -> None:
    """What a unit costs the driver is its calls; each unit is scored all the same, by itself."""
    calls = tmp_path / "calls"
    server = type("Server", (CountingServer,), {"trace": str(calls)})
    roles = replace(_roles(tmp_path, sample_seconds=0.1), reward=server)
    prompts = {"per_iteration": 32, "samples_per_prompt": 4}
    train(_config(tmp_path, iterations=2, prompts=prompts), roles=roles)
    counts = [int(line) for line in calls.read_text().split()]
    assert sum(counts) == 64
    assert len(counts) < 64 * 0.8
    lines = read_metrics(tmp_path / "run")
    assert [line["reward/masked"] for line in lines] == [0, 0]
