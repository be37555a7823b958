"""A run directory keeps what was changed on resume; `--resume auto` finds it or starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from texforce_ray.config_io import load_config
from texforce_ray.errors import ConfigError, RunDirectoryError
from texforce_ray.records.run_directory import RunDirectory, check_resumable, read_config
from texforce_ray.run import _resumed

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def _start(path: Path) -> None:
    RunDirectory.create(load_config(SMOKE, [f"run_dir={path}"]), "digest").close()


def test_changed_settings_are_kept_with_the_run(tmp_path: Path) -> None:
    _start(tmp_path)
    for start, lr in ((3, 1e-4), (5, 1e-5)):
        config = read_config(tmp_path, [f"optimizer.lr={lr}"])
        changes = check_resumable(config, "digest")
        RunDirectory.reopen(config, start, changes).close()
    lines = [json.loads(x) for x in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert lines == [
        {"after_iteration": 3, "key": "optimizer.lr", "from": 1e-3, "to": 1e-4},
        {"after_iteration": 5, "key": "optimizer.lr", "from": 1e-4, "to": 1e-5},
    ]
    assert read_config(tmp_path).optimizer.lr == 1e-5


def test_a_resume_that_changes_nothing_notes_nothing(tmp_path: Path) -> None:
    _start(tmp_path)
    config = read_config(tmp_path, ["rollout.num_workers=2"])
    RunDirectory.reopen(config, 1, check_resumable(config, "digest")).close()
    assert not (tmp_path / "changes.jsonl").exists()


def test_what_a_killed_process_had_begun_is_removed(tmp_path: Path) -> None:
    _start(tmp_path)
    (tmp_path / "samples").mkdir(exist_ok=True)
    (tmp_path / "samples" / ".iteration-00002.parquet.dc87635b.tmp").write_bytes(b"PAR1")
    (tmp_path / "checkpoints" / ".step-00003.tmp").mkdir(parents=True)
    (tmp_path / "samples" / "iteration-00001.parquet").write_bytes(b"whole")
    RunDirectory.reopen(read_config(tmp_path), 1).close()
    assert not list(tmp_path.rglob(".*.tmp"))
    assert (tmp_path / "samples" / "iteration-00001.parquet").read_bytes() == b"whole"


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    _start(tmp_path)
    with pytest.raises(RunDirectoryError, match="prompts"):
        check_resumable(read_config(tmp_path), "another digest")


def test_resume_auto_starts_and_then_continues(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _resumed(SMOKE, "auto", [f"run_dir={run}"]) is None
    run.mkdir()
    assert _resumed(SMOKE, "auto", [f"run_dir={run}"]) is None
    _start(run)
    assert _resumed(SMOKE, "auto", [f"run_dir={run}"]) == run
    assert _resumed(None, str(run), []) == run
    assert _resumed(SMOKE, None, []) is None


def test_resume_auto_needs_a_fixed_place_and_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run_dir: 'runs/smoke-\{time\}' is a new folder"):
        _resumed(SMOKE, "auto", [])
    with pytest.raises(ConfigError, match="--config FILE"):
        _resumed(None, "auto", [])
