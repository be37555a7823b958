"""A resumed run completes what its last iteration was stopped in."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.chaos.torture import checkpoint
from texforce_ray.config.io import load_config
from texforce_ray.driver.advantages import AdvantageEstimator
from texforce_ray.driver.evaluation import Evaluation
from texforce_ray.driver.recorder import Recorder
from texforce_ray.errors import RunDirectoryError
from texforce_ray.records.checkpoint import read_best, save_checkpoint
from texforce_ray.records.looks import Looks
from texforce_ray.records.metrics import read_metrics
from texforce_ray.records.run_directory import RunDirectory

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def _evaluation(total: float) -> Evaluation:
    images = np.full((2, 64, 64, 3), 200, dtype=np.uint8)
    return Evaluation(
        ("a", "a"), np.arange(2), np.full((2, 1), total), np.full(2, total), images,
        Looks.of(images),
    )  # fmt: skip


def test_an_evaluation_records_artefacts_beside_the_base_models(tmp_path: Path) -> None:
    config = load_config(SMOKE, [f"run_dir={tmp_path}"])
    plain = _evaluation(0.3)
    images = plain.shown.copy()
    images[:, ::2, ::2] = images[:, 1::2, 1::2] = 150
    with RunDirectory.create(config, "digest") as directory:
        recorder = Recorder(config, directory)
        recorder.base_evaluation(plain, new=True)
        recorder.evaluation(2, replace(plain, shown=images, looks=Looks.of(images)))
    found = recorder._evaluation
    assert found["eval/base_grid"] == pytest.approx(0, abs=1e-6)
    assert found["eval/base_high_frequency"] == pytest.approx(0, abs=1e-6)
    assert found["eval/grid"] == pytest.approx(25 / 255, rel=0.05)
    assert found["eval/high_frequency"] > 0.9


def _stopped(run_dir: Path, *, evaluated: float | None) -> Any:
    """A run of four iterations with an evaluation every two, stopped within or after the last."""
    config = load_config(SMOKE, [f"run_dir={run_dir}", "eval.every=2", "iterations=8"])
    with RunDirectory.create(config, "digest") as directory:
        recorder = Recorder(config, directory)
        for iteration in range(4):
            values: dict[str, Any] = {"reward/total_mean": 0.1 * iteration}
            score = {1: 0.3, 3: evaluated}.get(iteration)
            if score is not None:
                recorder.evaluation(iteration + 1, _evaluation(score))
                values |= recorder._evaluation
            directory.metrics.append(iteration, values)
    save_checkpoint(run_dir, checkpoint(4))
    return config


def _resume(config: Any, evaluate: Any) -> list[str]:
    redone = []
    with RunDirectory.reopen(config, 4) as directory:
        recorder = Recorder(config, directory)

        async def again() -> None:
            redone.append("evaluation")
            recorder.evaluation(4, evaluate)

        policy: Any = SimpleNamespace(version=4, checkpoint=lambda _: checkpoint(4))
        asyncio.run(recorder.catch_up(policy, AdvantageEstimator(config, {}), again))
    return redone


def _images(run_dir: Path) -> list[int]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return [event.step for event in events.Images("eval/images")]


def test_an_evaluation_that_was_cut_short_is_redone(tmp_path: Path) -> None:
    config = _stopped(tmp_path, evaluated=None)
    assert _resume(config, _evaluation(0.9)) == ["evaluation"]
    lines = read_metrics(tmp_path)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    assert lines[3]["eval/total"] == pytest.approx(0.9)
    assert lines[3]["reward/total_mean"] == pytest.approx(0.3)
    best = read_best(tmp_path)
    assert best is not None
    assert (best["iteration"], best["score"]) == (4, pytest.approx(0.9))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/total")] == [1, 3]
    assert _resume(config, _evaluation(0.9)) == [], "once it is there, it stands"


def test_a_best_checkpoint_that_a_kill_left_unnoted_is_noted(tmp_path: Path) -> None:
    config = _stopped(tmp_path, evaluated=0.8)
    assert read_best(tmp_path) is None
    assert _resume(config, _evaluation(0.1)) == []
    best = read_best(tmp_path)
    assert best is not None
    assert best["score"] == pytest.approx(0.8)


def test_the_grid_of_the_version_that_is_resumed_stays_in_tensorboard(tmp_path: Path) -> None:
    config = _stopped(tmp_path, evaluated=0.8)
    assert _images(tmp_path) == [2, 4]
    _resume(config, None)
    assert _images(tmp_path) == [2, 4]


def test_a_signal_while_an_iteration_is_written_leaves_no_gap(tmp_path: Path) -> None:
    """The one that had to wait for the writer is written too, after it."""
    config = load_config(SMOKE, [f"run_dir={tmp_path}"])
    written: list[str] = []

    async def job() -> None:
        slow, nobody = asyncio.Event(), SimpleNamespace()

        def lines(record: Any, *_: Any) -> Any:
            async def write() -> None:
                await slow.wait()
                written.append(record.updated)

            return write

        recorder._lines = lines  # type: ignore[method-assign]
        recorder._checkpoint_if_due = lambda *_: []  # type: ignore[method-assign]

        async def iterate(name: Any) -> None:
            async with recorder.iteration(nobody, nobody, nobody) as record:  # type: ignore[arg-type]
                record.training, record.updated = nobody, name  # type: ignore[assignment]

        await iterate("first")
        second = asyncio.ensure_future(iterate("second"))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.wait([second])
        assert second.cancelled()
        assert not written
        slow.set()
        await recorder.written()

    with RunDirectory.create(config, "digest") as directory:
        recorder = Recorder(config, directory)
        asyncio.run(job())
    assert written == ["first", "second"]


def test_after_a_write_that_failed_nothing_is_written(tmp_path: Path) -> None:
    config = load_config(SMOKE, [f"run_dir={tmp_path}"])
    written: list[str] = []

    async def job() -> None:
        nobody = SimpleNamespace()

        def lines(record: Any, *_: Any) -> Any:
            async def write() -> None:
                if record.updated == "first":
                    raise RunDirectoryError("the disk is full")
                written.append(record.updated)

            return write

        recorder._lines = lines  # type: ignore[method-assign]
        recorder._checkpoint_if_due = lambda *_: []  # type: ignore[method-assign]
        for name in ("first", "second"):
            with contextlib.suppress(RunDirectoryError):
                async with recorder.iteration(nobody, nobody, nobody) as record:  # type: ignore[arg-type]
                    record.training, record.updated = nobody, name  # type: ignore[assignment]
        with pytest.raises(RunDirectoryError, match="full"):
            await recorder.checkpoint(nobody, nobody)  # type: ignore[arg-type]

    with RunDirectory.create(config, "digest") as directory:
        recorder = Recorder(config, directory)
        asyncio.run(job())
    assert not written
