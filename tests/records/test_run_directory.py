"""A run directory keeps what was changed on resume; `--resume auto` finds it or starts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from texforce_ray import report, status
from texforce_ray.artifacts.location import EMBEDDED_BASES
from texforce_ray.config.io import load_config, make_config, resolve_run_dir
from texforce_ray.errors import ConfigError, RunDirectoryError
from texforce_ray.records.run_directory import RunDirectory, check_resumable, read_config
from texforce_ray.records.samples import write_samples
from texforce_ray.records.status import StatusFile
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


def test_a_run_on_replaced_weights_is_refused(tmp_path: Path) -> None:
    """The embedded pipeline's first weights were replaced: their runs recorded no base."""
    _start(tmp_path)
    inputs = json.loads((tmp_path / "inputs.json").read_text())
    assert inputs.pop("base") == EMBEDDED_BASES["embedded"]
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(RunDirectoryError, match="earlier version of the embedded pipeline"):
        check_resumable(read_config(tmp_path), "digest")


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


LABELS = ("ästhetik", "my reward", "a/b", "日本", "../x", "<b>x</b>", "x_mean")


@pytest.mark.parametrize(
    "name",
    [
        "exp #3/ü lauf", "100% {x} $HOME", "q?x=1&y", "日本語", "[brackets]*", "'quote\"",
        "back\\slash", "${oc.env:HOME}", "new\nline", "d" * 200 + "/" + "e" * 200,
    ],
)  # fmt: skip
def test_a_run_may_have_any_name_and_rewards_any_label(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = [{"name": "shapes", "label": label} for label in LABELS]
    run = tmp_path / name
    given = make_config({"run_dir": str(run), "rewards": rewards, "eval": {"every": 1}})
    with RunDirectory.create(given, "digest") as directory:
        StatusFile(run).write({"state": "finished", "version": 1, "iterations": 1})
        totals = {"reward/total_mean": 0.5, "eval/total": 0.5}
        directory.metrics.append(0, totals | {f"reward/{label}_mean": 0.1 for label in LABELS})
        columns = {"seed": np.arange(2), "masked": np.array([True, False])}
        rewards_of = {f"reward_{label}": np.ones(2) for label in LABELS}
        write_samples(run, 0, columns | rewards_of)
        directory.write_grid(1, np.zeros((2, 64, 64, 3), np.uint8), ["ü", "b"], np.ones(2))
        page = directory.report().read_text()
        assert directory.recorded_mask(0, np.arange(2)).tolist() == [False, True]
    assert "<b>x</b>" not in page
    again = read_config(run)
    assert again == given
    RunDirectory.reopen(again, 1, check_resumable(again, "digest")).close()
    assert status.main([str(run), "--once"]) == 0
    assert report.main([str(run)]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x" * 300, "choose a shorter run_dir"),
        ("y/" * 2500, "choose a shorter run_dir"),
        ("nul\0", "run_dir: "),
        ("\udcff", "run_dir: "),
    ],
)
def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path, name: str, said: str) -> None:
    def start() -> None:
        config = resolve_run_dir(make_config({"run_dir": f"{tmp_path}/{name}"}))
        RunDirectory.create(config, "digest")

    with pytest.raises((ConfigError, RunDirectoryError), match=said):
        start()


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_working_directory(name: str) -> None:
    with pytest.raises(ConfigError, match="run_dir"):
        resolve_run_dir(load_config(None, [f"run_dir={name}"]))


@pytest.mark.parametrize("labels", [["total"], ["drift"], ["x", "base_x"], ["a\nb"], ["x" * 101]])
def test_labels_that_metrics_have_another_use_for_are_refused(labels: list[str]) -> None:
    with pytest.raises(ConfigError, match="label"):
        make_config({"rewards": [{"name": "shapes", "label": label} for label in labels]})
