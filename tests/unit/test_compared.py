"""The comparison of objectives: one run of it, whole, and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import objectives, objectives_page
from benchmarks import objectives_plan as plan


@pytest.mark.long
def test_a_run_is_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_of = plan.config_of

    def smaller(run: plan.Run, **given: Any) -> Any:
        given["more"] = ["prompts.samples_per_prompt=8", *given.get("more", ())]
        return config_of(run, **given)

    monkeypatch.setattr(plan, "config_of", smaller)
    for name, value in {"RESULTS": tmp_path / "kept", "IMAGES": 8, "CURVE_IMAGES": 8}.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(plan, "ITERATIONS", 2)
    monkeypatch.setattr(objectives_page, "PAGE", tmp_path / "page.md")
    base = objectives.evaluate_base(gpu=False)
    row = ("nft", "both", 1e-3, 0.1)
    monkeypatch.setattr(plan, "rows", lambda: [row])
    run = plan.Run(*row, 0, 2)
    objectives.perform(run, base, gpu=False)
    kept = plan.result(run)
    assert kept is not None
    assert [point["samples"] for point in kept["curve"]] == [32, 64]
    assert 0 < kept["unseen"]["drift"] < 1
    objectives_page.write_page()
    page = (tmp_path / "page.md").read_text()
    assert f"| nft: lr 0.001, beta 0.1 | {kept['seen']['reward']:.3f}" in page
    assert (tmp_path / "kept" / "both-samples.svg").is_file()


def test_every_run_has_a_valid_config() -> None:
    runs = list(plan.searched())
    assert len(runs) == len(plan.OBJECTIVES) * len(plan.PARTS) * 6
    for run in runs:
        config = plan.config_of(run)
        assert config.optimizer.lr == run.rate
        assert config.objective.kind in run.name or config.direct is not None
