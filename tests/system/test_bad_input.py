"""Every wrong input: one clear error, a non-zero exit, nothing started, nothing damaged."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.conftest import REPO, Finished, finish, start
from texforce_ray import run

SMOKE = ("--config", "configs/smoke.yaml")


def fails(*arguments: str, directory: Path, timeout: float = 60) -> str:
    """The error that the command ends with; checks how it ends."""
    finished = finish(start(*arguments), directory, timeout)
    return only_error(finished.code, finished.output)


def only_error(code: int, output: str) -> str:
    assert code == 1, output
    assert "Traceback" not in output, output
    assert len(re.findall(r"^error: ", output, re.MULTILINE)) == 1
    return output.partition("\nerror: ")[2] or output


def refused(tmp_path: Path, overrides: list[str], expected: list[str], fail: Callable) -> None:
    """`fail` runs the command and returns its error, which names what is `expected`."""
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "file").write_text("precious")
    names = {"EMPTY": str(tmp_path / "empty.txt"), "FILE": str(tmp_path / "file")}

    def filled(text: str) -> str:
        for key, value in names.items():
            text = text.replace(key, value)
        return text

    first = () if any("run_dir" in o for o in overrides) else (f"run_dir={tmp_path / 'run'}",)
    error = fail(*SMOKE, *first, *map(filled, overrides))
    for part in expected:
        assert filled(part) in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rollout.bacth_size=3"], ["rollout.bacth_size", "rollout.batch_size"]),
        (["run_dir=FILE/run"], ["FILE"]),
    ],
)
def test_wrong_config(overrides: list[str], expected: list[str], tmp_path: Path) -> None:
    refused(tmp_path, overrides, expected, lambda *given: fails(*given, directory=tmp_path))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["iterations=many"], ["iterations", "many"]),
        (["rollout.batch_size=3"], ["rollout.batch_size", "3", "8 samples", "1, 2, 4, 8"]),
        (
            ["prompts.train.path=nowhere.txt", "prompts.train.set=null"],
            ["nowhere.txt", "does not exist"],
        ),
        (["prompts.train.path=EMPTY", "prompts.train.set=null"], ["empty.txt", "no prompts"]),
        (["prompts.train.set=animalz"], ["animalz", "shapes"]),
        (["rewards=[{name: beauty}]"], ["beauty", "jpeg_compressibility"]),
        (["run_dir=/proc/texforce"], ["/proc/texforce"]),
        (["run_dir=s3://bucket/run"], ["run_dir", "'s3://bucket/run' is a URI", "mount"]),
    ],
)
def test_wrong_config_in_this_process(
    overrides: list[str], expected: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A process for each would import for seconds what is imported here."""
    monkeypatch.chdir(REPO)

    def fail(*arguments: str) -> str:
        code = run.main([*arguments])
        return only_error(code, "".join(capsys.readouterr()))

    refused(tmp_path, overrides, expected, fail)


def test_no_such_config_file(tmp_path: Path) -> None:
    error = fails("--config", "configs/shape.yaml", directory=tmp_path)
    assert "configs/shape.yaml does not exist" in error
    assert "shapes.yaml" in error


def test_resume_from_what_is_not_a_run(tmp_path: Path) -> None:
    assert "is not a run" in fails("--resume", str(tmp_path), directory=tmp_path)


def test_resume_with_another_config_names_the_difference(plain: Finished) -> None:
    before = (plain.directory / "config.yaml").read_bytes()
    error = fails("--resume", str(plain.directory), "seed=9", directory=plain.directory)
    assert "seed: was 0, now 9" in error
    assert (plain.directory / "config.yaml").read_bytes() == before


def test_a_directory_that_holds_a_run_is_not_overwritten(plain: Finished) -> None:
    before = (plain.directory / "metrics.jsonl").read_bytes()
    error = fails(*SMOKE, f"run_dir={plain.directory}", directory=plain.directory)
    assert "already holds a run" in error
    assert "--resume" in error
    assert (plain.directory / "metrics.jsonl").read_bytes() == before


def test_relative_run_directory_under_a_ray_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    error = fails(*SMOKE, "run_dir=runs/x", directory=tmp_path)
    assert "run_dir" in error
    assert "absolute" in error


def test_no_room_is_said_at_once(tmp_path: Path) -> None:
    error = fails(
        *SMOKE, f"run_dir={tmp_path / 'run'}", "rollout.num_workers=2", "rollout.num_gpus=1",
        "ray.resource_timeout_s=3", directory=tmp_path,
    )  # fmt: skip
    assert "GPU: 2 needed, 0 free" in error
    assert "--fit" in error


def test_model_path_that_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    error = fails(
        *SMOKE, f"run_dir={tmp_path / 'run'}", f"model.path={tmp_path / 'model'}",
        directory=tmp_path,
    )  # fmt: skip
    assert "model.path" in error
    assert "model_index.json" in error


def test_dry_run_starts_nothing(tmp_path: Path) -> None:
    finished = finish(start(*SMOKE, "--dry-run", f"run_dir={tmp_path / 'run'}"), tmp_path, 60)
    assert finished.code == 0
    assert "plan:" in finished.output
    assert "rollout" in finished.output
    assert not (tmp_path / "run").exists()
