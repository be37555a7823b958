"""The short drill: runs that are broken on purpose end with the bits of those left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.drill import KINDS, SHORT, scenarios
from tests.chaos.torture import torture


@pytest.mark.timeout(400)
def test_broken_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    # A process of its own: Ray's authentication is settled when a process first imports it.
    drill = [sys.executable, str(Path(__file__).parent / "drill.py"), "--short"]
    ended = subprocess.run(
        [*drill, "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-3000:]}\n{logs}"
    assert f"| all | {sum(len(kinds) for _, kinds in SHORT)} |" in ended.stdout


def test_a_long_drill_has_every_kind_equally_often() -> None:
    drawn = [kind for _, kinds in scenarios(210, seed=1) for kind in kinds]
    assert len(drawn) == 210
    assert {drawn.count(kind) for kind in KINDS} == {14}
    assert {k for k, _ in scenarios(210, seed=1)} == {0, 1}


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    outcome = torture(tmp_path, kills=40, seed=0)
    assert outcome.clean, outcome
    assert outcome.torn  # or nothing was tested
