"""Where a run resumes when checkpoints are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.torture import checkpoint
from texforce_ray.config.io import load_config
from texforce_ray.driver.session import restore
from texforce_ray.errors import CheckpointError
from texforce_ray.records import checkpoint as checkpoints
from texforce_ray.records.checkpoint import Whole, prune, save_checkpoint


def _damaged(run_dir: Path, *iterations: int) -> None:
    for iteration in iterations:
        file = save_checkpoint(run_dir, checkpoint(iteration)) / "state.json"
        file.write_bytes(file.read_bytes()[:-3])


def _restored(run_dir: Path) -> int | None:
    found = restore(load_config("configs/smoke.yaml", [f"run_dir={run_dir}"]))
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
    assert "starting the run again" in caplog.text


def test_not_from_the_beginning_of_a_long_run(tmp_path: Path) -> None:
    _damaged(tmp_path, 7, 8)
    with pytest.raises(CheckpointError, match="move that folder away"):
        _restored(tmp_path)


def test_pruning_hashes_each_checkpoint_once_and_again_where_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def is_complete(path: Path) -> bool:
        hashed.append(path.name)
        return real(path)

    real = checkpoints.is_complete
    whole = Whole()
    for iteration in range(1, 7):
        save_checkpoint(tmp_path, checkpoint(iteration))
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "is_complete", is_complete)
            prune(tmp_path, 2, whole)
    assert hashed == [f"step-{i:05d}" for i in range(1, 7)]
    _damaged(tmp_path, 6)
    save_checkpoint(tmp_path, checkpoint(7))
    prune(tmp_path, 2, whole)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00005", "step-00006", "step-00007"], "a damaged one pushes none out"
