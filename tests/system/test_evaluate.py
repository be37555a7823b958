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


def test_sums_of_adapters_on_several_prompt_sets(plain: Finished, tmp_path: Path) -> None:
    out, adapter = tmp_path / "out", plain.directory / "adapter"
    done = evaluate(
        "--config", "configs/smoke.yaml", "--adapter", f"one={adapter}",
        "--fuse", f"halves={adapter}*0.5+{adapter}*0.5", "--fuse", f"none={adapter}*0",
        "--prompts", "shapes-phrases", "--prompts", "shapes-phrases-unseen",
        "--images", "8", "--save-images", "6", "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summaries = json.loads(done.stdout.strip().splitlines()[-1])
    assert list(summaries) == ["shapes-phrases", "shapes-phrases-unseen"]
    for prompts, summary in summaries.items():
        assert summary == json.loads((out / prompts / "summary.json").read_text())
        looks = summary["looks"]
        assert looks["none"]["drift"] == 0 < looks["one"]["drift"]
        assert abs(looks["halves"]["drift"] - looks["one"]["drift"]) < 1e-3
        assert len(list((out / prompts / "images" / "halves").glob("*.png"))) == 6
    seen = pq.read_table(out / "shapes-phrases" / "samples.parquet").column("prompt").to_pylist()
    assert "a green circle" in seen


def test_a_term_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    done = evaluate("--fuse", "both=a*x+b", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "'a*x' neither exists nor looks like DIR*0.5" in done.stderr


def test_what_is_no_adapter_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = evaluate("--adapter", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "is not an adapter" in done.stderr
    assert "Traceback" not in done.stderr
