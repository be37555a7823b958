"""The experiments' plan and page: resumable steps, honest intervals, nothing lost between seeds."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from texforce_ray.config_io import load_config
from texforce_ray.experiments import __main__ as command
from texforce_ray.experiments.page import write_page
from texforce_ray.experiments.results import rows, seed_interval
from texforce_ray.experiments.shapes import EXPERIMENTS
from texforce_ray.experiments.stages import Evaluate, Sweep, Train
from texforce_ray.prompts import load_prompts
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


def test_the_interval_knows_of_seeds_and_of_images() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(0.1, 1.0, (1, 400))
    same = seed_interval(np.repeat(images, 3, axis=0))
    assert same[0] < images.mean() < same[1]
    apart = seed_interval(np.array([[-0.5], [0.0], [0.5]]) + images)
    assert apart[1] - apart[0] > 2 * (same[1] - same[0])


def _evaluation(folder: Path, gain: float) -> None:
    base = np.linspace(0, 0.5, 32)
    columns: dict[str, Any] = {"base_total": base}
    columns |= {f"{label}_total": base + gain for label in ("U-Net", "text encoder")}
    looks = {label: {"diversity": 0.2, "drift": 0.1} for label in ("base", "U-Net", "text encoder")}
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
    assert "start again to go on" in capsys.readouterr().err


def test_the_committed_page_is_what_the_committed_results_give(tmp_path: Path) -> None:
    page = REPO / "docs" / "results" / "shapes.md"
    again = tmp_path / "docs" / "results" / "shapes.md"
    again.parent.mkdir(parents=True)
    import shutil

    shutil.copytree(page.with_suffix(""), again.with_suffix(""))
    write_page(again.with_suffix(""), again)
    assert again.read_text() == page.read_text(), "write it with: make paper-page"
