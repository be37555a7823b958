"""The experiments' plan and page: resumable steps, honest intervals, nothing lost between seeds."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from texforce_ray.config.io import load_config
from texforce_ray.driver.evaluation import paired_difference
from texforce_ray.errors import RunDirectoryError
from texforce_ray.experiments import __main__ as command
from texforce_ray.experiments.page import write_page
from texforce_ray.experiments.results import rows
from texforce_ray.experiments.shapes import EXPERIMENTS
from texforce_ray.experiments.stages import Evaluate, Sweep, Train
from texforce_ray.prompts import load_prompts
from texforce_ray.records.intervals import bootstrap_interval, crossed_interval
from texforce_ray.records.samples import to_parquet

REPO = Path(__file__).parents[2]
STAGES = [stage for stages in EXPERIMENTS.values() for stage in stages]


def test_every_step_finds_its_config_its_prompts_and_what_is_trained_before_it() -> None:
    trained: set[str] = set()
    for stage in STAGES:
        if isinstance(stage, Train):
            load_config(REPO / stage.config, list(stage.overrides))
            trained.add(stage.name)
        elif isinstance(stage, Evaluate):
            for prompts in stage.prompts:
                overrides = [f"eval.prompts.set={prompts}", "eval.prompts.path=null"]
                config = load_config(REPO / stage.config, overrides)
                assert config.eval.prompts is not None
                assert load_prompts(config.eval.prompts)
            needed = {name for terms in stage.policies.values() for name, _ in terms}
            assert needed <= trained, f"{stage.name} needs {needed - trained}"
        else:
            assert isinstance(stage, Sweep)
            assert set(stage.adapters) <= trained
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)


def test_a_begun_run_is_resumed_and_a_finished_one_left_alone(tmp_path: Path) -> None:
    stage = Train("text", "configs/shapes/text.yaml")
    assert "seed=7" in stage.command(tmp_path, 7)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.yaml").touch()
    assert "--resume" in stage.command(tmp_path, 7)
    assert not stage.done(tmp_path)
    (tmp_path / "text" / "report.html").touch()
    assert stage.done(tmp_path)


def _width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def test_the_interval_knows_of_seeds_and_of_images() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(0.1, 1.0, (1, 400))
    same = crossed_interval(np.repeat(images, 3, axis=0))
    assert same[0] < images.mean() < same[1]
    apart = crossed_interval(np.array([[-0.5], [0.0], [0.5]]) + images)
    assert _width(apart) > 2 * _width(same)


def test_seeds_on_the_same_images_are_no_further_images() -> None:
    images = np.random.default_rng(0).normal(0.1, 1.0, (1, 400))
    one = _width(crossed_interval(images))
    three = _width(crossed_interval(np.repeat(images, 3, axis=0)))
    assert three == pytest.approx(one, rel=0.1), "drawn anew for each seed it would be 0.58 of it"
    assert one == pytest.approx(2 * 1.96 * images.std() / 20, rel=0.1)


def test_images_of_one_prompt_are_no_independent_samples() -> None:
    rng = np.random.default_rng(0)
    prompts = [f"prompt {i % 40}" for i in range(800)]
    hard = rng.normal(0, 1.0, 40)
    scores = hard[np.arange(800) % 40] + rng.normal(0, 0.1, 800)
    expected = 2 * 1.96 * hard.std() / 40**0.5
    assert _width(bootstrap_interval(scores, prompts)) == pytest.approx(expected, rel=0.15)
    assert _width(bootstrap_interval(scores)) < 0.3 * expected
    difference = paired_difference(np.zeros(800), scores, prompts)
    assert difference["high"] - difference["low"] == pytest.approx(expected, rel=0.15)


def test_where_nothing_is_repeated_or_there_is_one_prompt_images_are_drawn() -> None:
    scores = np.random.default_rng(0).normal(0, 1.0, 100)
    plain = bootstrap_interval(scores)
    assert bootstrap_interval(scores, ["a prompt"] * 100) == plain
    distinct = bootstrap_interval(scores, [f"prompt {i:03d}" for i in range(100)])
    assert distinct == plain


def test_what_was_not_scored_is_left_out_of_the_interval() -> None:
    scores = np.array([1.0, 1.0, np.nan, np.nan, 3.0, np.nan])
    low, high = bootstrap_interval(scores, ["a", "a", "b", "b", "c", "c"])
    assert (low, high) == (1.0, 3.0)
    assert np.isnan(bootstrap_interval(np.full(3, np.nan))).all()


def _evaluation(folder: Path, gain: float, **more: Any) -> None:
    base = np.linspace(0, 0.5, 32)
    columns: dict[str, Any] = {"base_total": base, **more}
    columns |= {f"{label}_total": base + gain for label in ("U-Net", "text encoder")}
    look = {"diversity": 0.2, "drift": 0.1, "style_drift": 0.05}
    looks = dict.fromkeys(("base", "U-Net", "text encoder"), look)
    folder.mkdir(parents=True)
    (folder / "samples.parquet").write_bytes(to_parquet(columns))
    (folder / "summary.json").write_text(json.dumps({"looks": looks}))


def test_the_page_shows_every_seed_that_is_there(tmp_path: Path) -> None:
    results, page = tmp_path / "shapes", tmp_path / "shapes.md"
    stage = next(s for s in STAGES if s.name == "headline")
    assert isinstance(stage, Evaluate)
    for seed, gain in ((0, 0.1), (3, 0.2)):
        _evaluation(results / f"seed-{seed}" / "headline" / "shapes-phrases", gain)
        curve = [{"iteration": i, "reward": 0.2 + gain * i, "drift": 0.1 * i} for i in range(3)]
        for name in ("text", "unet"):
            (results / f"seed-{seed}" / name).mkdir()
            (results / f"seed-{seed}" / name / "curve.json").write_text(json.dumps(curve))
    (results / "discussion.md").write_text("What it says.")
    found = {row.label: row for row in rows(results, stage, "shapes-phrases")}
    assert list(found) == ["base", "U-Net", "text encoder"]
    assert found["U-Net"].by_seed == pytest.approx((0.1, 0.2))
    assert found["U-Net"].difference == pytest.approx(0.15)
    write_page(results, page)
    text = page.read_text()
    assert "Training seeds: 0, 3." in text
    assert "| U-Net | 0.400 | +0.150 | " in text
    assert "+0.100, +0.200" in text
    assert "What it says." in text
    assert "shapes/headline-drift.svg" in text
    assert (results / "headline-drift.svg").read_text().startswith("<svg")
    assert "Incompress" not in text, "what has no result yet has no section"


def test_seeds_that_were_evaluated_on_other_images_are_refused(tmp_path: Path) -> None:
    stage = next(s for s in STAGES if s.name == "headline")
    assert isinstance(stage, Evaluate)
    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}" / "headline" / "shapes-phrases"
        _evaluation(folder, 0.1, prompt=[f"prompt {i + seed}" for i in range(32)])
    with pytest.raises(RunDirectoryError, match=r"seed-1.*other prompts or seeds"):
        rows(tmp_path, stage, "shapes-phrases")


def test_a_failed_step_ends_the_command_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPO)
    started: list[list[str]] = []

    def run(line: list[str], *, check: bool) -> subprocess.CompletedProcess:
        started.append(line)
        return subprocess.CompletedProcess(line, 1)

    monkeypatch.setattr(command.subprocess, "run", run)
    given = ["shapes", "--only", "people", "--out", str(tmp_path / "runs")]
    assert command.main([*given, "--results", str(tmp_path / "shapes")]) == 1
    assert len(started) == 1
    assert "run this again to resume" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["shapes", "rates"])
def test_the_committed_page_is_what_the_committed_results_give(name: str, tmp_path: Path) -> None:
    page = REPO / "docs" / "results" / f"{name}.md"
    again = tmp_path / "docs" / "results" / f"{name}.md"
    again.parent.mkdir(parents=True)
    import shutil

    shutil.copytree(page.with_suffix(""), again.with_suffix(""))
    write_page(again.with_suffix(""), again)
    assert again.read_text() == page.read_text(), "write it with: make paper-page"
