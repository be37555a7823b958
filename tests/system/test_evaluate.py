"""`python -m texforce_ray.evaluate`: base and adapters on the same prompts and seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from tests.system.conftest import REPO, Finished


def evaluate(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "texforce_ray.evaluate", *arguments],
        cwd=REPO, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


def test_base_and_adapter_are_compared_pairwise(plain: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = evaluate("--run", str(plain.directory), "--images", "12", "--out", str(out))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary == json.loads((out / "summary.json").read_text())
    paired = summary["against_base"]["tuned"]["total"]
    rows = pq.read_table(out / "samples.parquet").to_pylist()
    assert len(rows) == 12
    difference = sum(r["tuned_total"] - r["base_total"] for r in rows) / 12
    assert abs(difference - paired["difference"]) < 1e-9
    assert paired["low"] <= difference <= paired["high"]
    wins = sum((r["tuned_total"] > r["base_total"]) for r in rows)
    ties = sum((r["tuned_total"] == r["base_total"]) for r in rows)
    assert paired["win_rate"] == (wins + ties / 2) / 12
    assert summary["looks"]["base"]["drift"] == 0 < summary["looks"]["tuned"]["drift"] < 0.5
    assert 0 < summary["looks"]["tuned"]["diversity"] < 1
    assert (out / "comparison.png").stat().st_size > 5000


def test_what_is_no_adapter_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = evaluate("--adapter", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "is not an adapter" in done.stderr
    assert "Traceback" not in done.stderr
