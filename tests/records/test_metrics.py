"""Metrics survive crashes and resumes, and TensorBoard shows the same numbers."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from texforce_ray.errors import RunDirectoryError
from texforce_ray.records.metrics import MetricsLog, read_metrics


def _write(
    run_dir: Path, iterations: range, *, resume_from: int | None = None, by: int = 1
) -> None:
    with MetricsLog(run_dir, resume_from=resume_from) as log:
        for iteration in iterations:
            log.append(iteration, {"reward/total": iteration * by})


def _scalars(run_dir: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("reward/total")]


def test_each_line_is_on_disk_as_valid_json_when_append_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    values = {
        "reward/total": np.float32(0.5),
        "ppo/approx_kl": math.nan,
        "learner/grad_norm": math.inf,
        "images": np.int64(3),
        "note": "größer",
        "eval/reward": None,
    }
    log.append(0, values)

    def strict(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text("utf-8"), parse_constant=strict)
    assert line == {
        "iteration": 0,
        "reward/total": 0.5,
        "ppo/approx_kl": None,
        "learner/grad_norm": None,
        "images": 3,
        "note": "größer",
        "eval/reward": None,
    }
    log.close()
    log.close()


@pytest.mark.parametrize(
    "tail", [b'{"iteration": 2, "rew', b'{"iteration": 2, "n": "\xc3', b"\0\0"]
)
def test_half_written_last_line_is_dropped(tmp_path: Path, tail: bytes) -> None:
    _write(tmp_path, range(2))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [0, 1]
    _write(tmp_path, range(2, 3))
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [0, 1, 2]


def test_complete_line_without_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}')
    _write(tmp_path, range(1, 2))
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [0, 1]


def test_resume_writes_later_iterations_again_everywhere(tmp_path: Path) -> None:
    _write(tmp_path, range(5))
    _write(tmp_path, range(3, 6), resume_from=3, by=10)
    expected = [(0, 0), (1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]
    lines = [(record["iteration"], record["reward/total"]) for record in read_metrics(tmp_path)]
    assert lines == expected
    assert _scalars(tmp_path) == expected


def test_damage_in_the_middle_is_reported_and_not_thrown_away(tmp_path: Path) -> None:
    text = '{"iteration": 0}\n<<<<<<< HEAD\n{"iteration": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(RunDirectoryError, match="line 2"):
        MetricsLog(tmp_path, resume_from=1)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_full_disk_on_opening_keeps_the_old_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, range(3))
    old = (tmp_path / "metrics.jsonl").read_bytes()

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(RunDirectoryError, match="No space left"):
        MetricsLog(tmp_path, resume_from=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == old


def test_disk_that_fills_within_a_line_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path)
    log.append(0, {"reward/total": 0.5})
    old = (tmp_path / "metrics.jsonl").read_bytes()
    real, calls = os.write, []

    def write(descriptor: int, data: memoryview) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:7])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl.*No space left"):
            log.append(1, {"reward/total": 0.6})
    assert (tmp_path / "metrics.jsonl").read_bytes() == old
    log.append(1, {"reward/total": 0.6})
    assert len(read_metrics(tmp_path)) == 2


def test_tensorboard_failure_warns_once_and_the_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file in the way")
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path) as log:
        log.append(0, {"reward/total": 1.0})
        log.append(1, {"reward/total": 2.0})
        log.add_image("grid", np.zeros((4, 4, 3), np.uint8), 1)
    assert len(read_metrics(tmp_path)) == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_tensorboard_shows_images(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.add_image("images/eval", np.full((6, 9, 3), 200, np.uint8), 7)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("images/eval")
    assert (image.step, image.height, image.width) == (7, 6, 9)


@pytest.mark.parametrize("values", [{"a": [1.0]}, {"a": np.zeros(2)}])
def test_what_is_no_metric_is_refused_by_name(tmp_path: Path, values: dict[str, Any]) -> None:
    with MetricsLog(tmp_path) as log:
        with pytest.raises(TypeError, match="'a'"):
            log.append(0, values)
        with pytest.raises(ValueError, match="iteration"):
            log.append(0, {"iteration": 4})
    assert read_metrics(tmp_path) == []


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_records_load_without_torch_or_tensorflow() -> None:
    records = ("metrics", "samples", "images", "report", "model_card")
    names = ["files", "observability.progress", *(f"records.{name}" for name in records)]
    code = (
        f"import sys; [__import__('texforce_ray.' + n) for n in {names}]; "
        "heavy = {'torch', 'tensorflow', 'diffusers', 'transformers', 'ray', 'pandas'}; "
        "sys.exit(' '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
