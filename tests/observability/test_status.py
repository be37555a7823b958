"""What the status view shows of drivers that are gone, large runs, jobs; what a full disk does."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from texforce_ray import status as command
from texforce_ray.errors import ActorError, Interrupted
from texforce_ray.files import to_json
from texforce_ray.observability.status_view import job_view, run_view
from texforce_ray.records.metrics import MetricsLog
from texforce_ray.records.status import STALE_S, StatusFile, outcome, read_status


def _write(run_dir: Path, **values: Any) -> None:
    given = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "time": time.time(),
        "started": time.time() - 100,
        "state": "running",
        "version": 3,
        "iterations": 10,
        "restarts": 1,
    }
    (run_dir / "status.json").write_text(to_json(given | values))


def _shown(view: Any) -> str:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def _actor(role: str, number: int, node: str, doing: str = "", seconds: float = 0.0) -> dict:
    state = "busy" if doing else "idle"
    return {"role": role, "name": f"{role}-{number}", "node": node, "state": state,
            "doing": doing, "seconds": seconds}  # fmt: skip


def test_a_driver_that_died_is_not_shown_as_running(tmp_path: Path) -> None:
    _write(tmp_path, pid=2**22 + 1)  # more than there can be
    shown = " ".join(_shown(run_view(tmp_path, read_status(tmp_path))).split())
    assert "exited without writing a final status" in shown
    _write(tmp_path, host="elsewhere")
    assert read_status(tmp_path).gone == ""
    _write(tmp_path, host="elsewhere", time=time.time() - STALE_S - 5)
    assert "elsewhere) has not written for 35 s" in " ".join(
        _shown(run_view(tmp_path, read_status(tmp_path))).split()
    )
    _write(tmp_path, host="elsewhere", time=time.time() - 1e6, state="finished")
    assert read_status(tmp_path).gone == ""


def test_many_actors_are_counted_by_role_and_node(tmp_path: Path) -> None:
    actors = [_actor("rollout", i, "10.0.0.1", "sampling", 3.0 * i) for i in range(20)]
    actors += [_actor("rollout", i, "10.0.0.2") for i in range(20, 30)]
    _write(tmp_path, actors=actors)
    shown = _shown(run_view(tmp_path, read_status(tmp_path)))
    assert "rollout x 20  10.0.0.1  20 busy  0:57" in shown
    assert "rollout x 10  10.0.0.2  10 idle" in shown


def test_errors_and_iterations_are_shown_within_80_columns(tmp_path: Path) -> None:
    error = {"time": time.time(), "text": "rollout-3 failed at sampling [iteration 3]: " + "x" * 90}
    doing = "sampling iteration 3, unit 11 of the run with the long name"
    _write(tmp_path, errors=[error], actors=[_actor("reward-imagereward", 0, "10.20.30.40", doing)])
    with MetricsLog(tmp_path) as log:
        for i in range(8):
            log.append(i, {"reward/total_mean": i / 10, "seconds/total": 2.0, "reward/masked": 3})
    shown = _shown(run_view(tmp_path, read_status(tmp_path)))
    assert "rollout-3 failed at sampling [iteration 3]" in " ".join(shown.split())
    assert "0.700" in shown
    assert "▁▂▃▄▅▆▇█" in shown
    assert "left 0:14" in shown  # seven iterations of two seconds
    assert max(map(len, shown.splitlines())) <= 80


def test_a_job_whose_directory_is_elsewhere_shows_its_log() -> None:
    shown = _shown(job_view("raysubmit_1", "RUNNING", Path("/far/run"), ["iteration 3/10"]))
    assert "raysubmit_1: RUNNING" in shown
    assert "/far/run cannot be read" in " ".join(shown.split())
    assert "iteration 3/10" in shown


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "finished"), (Interrupted("x"), "interrupted"), (ActorError("x"), "failed"),
     (KeyboardInterrupt(), "interrupted"), (RuntimeError("x"), "failed")],
)  # fmt: skip
def test_how_a_run_ended(error: BaseException | None, state: str) -> None:
    assert outcome(error) == state


def test_a_disk_that_refuses_costs_the_file_alone(tmp_path: Path) -> None:
    StatusFile(tmp_path / "gone").write({"state": "running"})
    assert not (tmp_path / "gone").exists()


def test_nothing_is_written_after_the_last_word(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    file.write({"state": "finished"}, last=True)
    file.write({"state": "running"})  # a thread that was late
    assert read_status(tmp_path).state == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main([str(tmp_path), "--once"]) == 1
    assert "is not a run" in capsys.readouterr().err
    assert command.main([str(tmp_path / "missing"), "--once"]) == 1
    assert "no such directory" in capsys.readouterr().err
