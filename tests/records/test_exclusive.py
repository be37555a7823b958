"""A run directory that another machine's driver writes is rejected, a dead driver's is not."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from texforce_ray.errors import RunDirectoryError
from texforce_ray.records import exclusive
from texforce_ray.records.exclusive import check_exclusive


def _write(run_dir: Path, **values: Any) -> None:
    known = {"host": "node-7", "pid": 4711, "time": time.time(), "state": "running"}
    file = run_dir / ".status.json.test"
    file.write_text(json.dumps(known | values))
    os.replace(file, run_dir / "status.json")


@contextmanager
def _driver(run_dir: Path, skew: float = 0.0, **values: Any) -> Iterator[None]:
    """Another machine's driver, whose clock may differ, writing every 0.1 s."""
    done = threading.Event()

    def keep_writing() -> None:
        while not done.wait(0.1):
            _write(run_dir, time=time.time() + skew, **values)

    _write(run_dir, time=time.time() + skew, **values)
    thread = threading.Thread(target=keep_writing)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Clock:
    """Time that passes only while someone sleeps."""

    def __init__(self) -> None:
        self.slept = 0.0

    def monotonic(self) -> float:
        return self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which `check_exclusive` waits."""
    clock = Clock()
    monkeypatch.setattr(exclusive, "time", clock)
    return clock


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent driver is waited for only shortly."""
    monkeypatch.setattr(exclusive, "PERIOD_S", 0.2)
    monkeypatch.setattr(exclusive, "STALE_S", 0.8)
    monkeypatch.setattr(exclusive, "_LOOK_S", 0.05)


@pytest.mark.parametrize("skew", [0.0, -300.0, 300.0])
def test_a_driver_at_work_elsewhere_is_named(tmp_path: Path, impatient: None, skew: float) -> None:
    with (
        _driver(tmp_path, skew),
        pytest.raises(RunDirectoryError, match=r"node-7 \(pid 4711\).*delete .*status\.json"),
    ):
        check_exclusive(tmp_path)


def test_a_driver_that_was_killed_elsewhere_is_soon_forgotten(tmp_path: Path, clock: Clock) -> None:
    _write(tmp_path)
    check_exclusive(tmp_path)
    assert 0 < clock.slept < exclusive.STALE_S + 1


@pytest.mark.parametrize(
    "values",
    [
        {"state": "finished"},
        {"state": "interrupted"},
        {"time": time.time() - 3600},
        {"host": socket.gethostname()},
    ],
)
def test_nothing_is_waited_for_where_the_file_or_the_lock_tells(
    tmp_path: Path, clock: Clock, values: dict[str, Any]
) -> None:
    _write(tmp_path, **values)
    check_exclusive(tmp_path)
    assert clock.slept == 0


def test_no_status_or_a_damaged_one_tells_nothing(tmp_path: Path) -> None:
    check_exclusive(tmp_path)
    (tmp_path / "status.json").write_text("{")
    check_exclusive(tmp_path)
