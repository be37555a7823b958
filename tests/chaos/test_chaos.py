"""The short drill: runs that are broken on purpose end with the bits of those left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.chaos.drill import JOB, SHORT, lines, scenarios
from tests.chaos.faults import ENDING, KINDS, WRITES
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
    planned = scenarios(10 * len(KINDS), seed=1)
    drawn = [kind for _, kinds in planned for kind in kinds]
    assert len(drawn) >= 200
    assert {drawn.count(kind) for kind in KINDS} == {10}
    assert {k for k, _ in planned} == {0, 1}
    for _, kinds in planned:  # only a driver that is restarted can be given such a fault
        places = [place for place, kind in enumerate(kinds) if kind in WRITES]
        assert all(place == 0 or kinds[place - 1] in ENDING for place in places)


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    outcome = torture(tmp_path, kills=40, seed=0)
    assert outcome.clean, outcome
    assert outcome.torn  # or nothing was tested


@pytest.mark.parametrize(("end", "code"), [("finish", 0), ("interrupt", 130), ("failure", 1)])
def test_no_process_outlives_a_run(end: str, code: int, tmp_path: Path) -> None:
    job = [sys.executable, str(JOB), str(tmp_path / "run"), "--iterations", "3"]
    if end != "finish":
        job[-1] = "300"
    if end == "failure":
        job += ["--break", "full:metrics:3"]
    run = subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family: set[psutil.Process] = set()
    deadline = time.monotonic() + 90
    while run.poll() is None and time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):
            family |= set(psutil.Process(run.pid).children(recursive=True))
        if lines(tmp_path / "run") >= 2 and end == "interrupt":
            run.send_signal(signal.SIGINT)
            run.wait(60)
        time.sleep(0.1)
    assert run.wait(1) == code
    assert len(family) > 4  # Ray's own and the actors'
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, [process.cmdline() for process in alive]
