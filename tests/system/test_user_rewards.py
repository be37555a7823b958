"""Rewards of the user's own, through real reward servers."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from tests.system.conftest import run
from tests.system.test_bad_input import SMOKE, fails

FAST = ("ray.start_timeout_s=120",)


def test_failures_are_retried_and_nan_is_masked_not_zero(tmp_path: Path) -> None:
    finished = run(
        tmp_path / "run",
        "rewards=[{name: shapes}, {target: 'tests.system.rewards:Redness', weight: 0.01}]",
        "iterations=1",
        "advantage.max_masked=0.5",
    )
    rows = pq.read_table(finished.directory / "samples" / "iteration-00000.parquet").to_pylist()
    assert [row["masked"] for row in rows] == [i % 4 == 0 for i in range(12)]
    assert all(row["advantage"] == 0 for row in rows if row["masked"])
    scored = [row for row in rows if not row["masked"]]
    for row in scored:
        assert abs(row["total"] - row["reward_shapes"] - 0.01 * row["reward_Redness"]) < 1e-9
    assert finished.metrics[0]["reward/masked"] == 3
    assert "reward/Redness_mean" in finished.metrics[0]


def test_too_many_failures_end_the_run_with_name_and_cause(tmp_path: Path) -> None:
    error = fails(
        *SMOKE,
        f"run_dir={tmp_path / 'run'}",
        "rewards=[{target: 'tests.system.rewards:Broken', retries: 0}]",
        "eval.every=0",
        directory=tmp_path,
        timeout=240,
    )
    assert "reward Broken could not score 8 of 8 samples" in error
    assert "the scoring service is down" in error


def test_a_class_without_score_is_refused(tmp_path: Path) -> None:
    error = fails(
        *SMOKE,
        f"run_dir={tmp_path / 'run'}",
        "rewards=[{target: 'tests.system.rewards:NoScore'}]",
        directory=tmp_path,
        timeout=240,
    )
    assert "has no method score" in error
    assert "NoScore" in error
