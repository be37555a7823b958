"""Where a run goes on when checkpoints are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.torture import checkpoint
from texforce_ray.config_io import load_config
from texforce_ray.driver import _restore
from texforce_ray.errors import CheckpointError
from texforce_ray.records.checkpoint import save_checkpoint


def _damaged(run_dir: Path, *iterations: int) -> None:
    for iteration in iterations:
        file = save_checkpoint(run_dir, checkpoint(iteration)) / "state.json"
        file.write_bytes(file.read_bytes()[:-3])


def _restored(run_dir: Path) -> int | None:
    found = _restore(load_config("configs/smoke.yaml", [f"run_dir={run_dir}"]))
    return found.iteration if found else None


def test_the_newest_whole_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(3))
    _damaged(tmp_path, 4, 5)
    assert _restored(tmp_path) == 3


def test_from_the_beginning_where_nothing_older_has_been_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _restored(tmp_path) is None
    _damaged(tmp_path, 1, 2)
    assert _restored(tmp_path) is None
    assert "starting it again" in caplog.text


def test_not_from_the_beginning_of_a_long_run(tmp_path: Path) -> None:
    _damaged(tmp_path, 7, 8)
    with pytest.raises(CheckpointError, match="move that folder away"):
        _restored(tmp_path)
