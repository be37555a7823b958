"""What a comparison of two benchmarks reports as moved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.compare import compare, figures

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare.py"


def result(seconds: float, wire_bytes: int = 100, machine: str = "2 cores") -> dict[str, Any]:
    rows = [{"rollouts": 1, "seconds": 1.0}, {"rollouts": 2, "seconds": seconds}]
    return {"machine": machine, "commit": "abc", "scaling": {"runs": rows, "bytes": wire_bytes}}


def test_rows_are_matched_by_what_they_are_of() -> None:
    one = result(2.0)
    other = result(2.0)
    other["scaling"]["runs"].reverse()
    assert dict(figures(one)) == dict(figures(other))
    assert dict(figures(one))["scaling.runs[rollouts=2].seconds"] == 2.0


def test_ranges_that_overlap_have_not_moved() -> None:
    rows, _ = compare([result(2.0), result(2.4)], [result(2.3), result(2.6)])
    assert all(row.gap == 0 for row in rows)
    rows, _ = compare([result(2.0), result(2.4)], [result(3.0), result(3.2)])
    assert rows[0].name == "scaling.runs[rollouts=2].seconds"
    assert abs(rows[0].gap - 0.6 / 3.1) < 1e-9


def test_a_figure_on_one_side_only_is_named() -> None:
    less = result(2.0)
    del less["scaling"]["bytes"]
    assert compare([less], [result(2.0)])[1] == ["scaling.bytes"]


def ran(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> tuple[int, str]:
    files = tmp_path / "before.json", tmp_path / "after.json"
    for file, content in zip(files, (before, after), strict=True):
        file.write_text(json.dumps(content))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, files)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_the_command_names_what_moved_and_fails_for_counts_alone(tmp_path: Path) -> None:
    code, out = ran(tmp_path, result(2.0), result(2.05))
    assert (code, "0 of 5 figures" in out) == (0, True)
    code, out = ran(tmp_path, result(2.0), result(3.0))
    assert code == 0
    assert "runs[rollouts=2].seconds: 2 -> 3 (x 1.500)" in out
    code, out = ran(tmp_path, result(2.0, 100), result(2.0, 101, "16 cores"))
    assert code == 1
    assert "scaling.bytes: 100 -> 101" in out
    assert "different machines" in out


def test_a_peak_of_memory_is_measured_and_may_move(tmp_path: Path) -> None:
    before, after = ({"utilisation": {"learner_bytes": 1000 + more}} for more in (0, 1))
    assert ran(tmp_path, before, after)[0] == 0
