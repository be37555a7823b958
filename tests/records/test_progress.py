"""Progress is readable in a job's log and in a terminal."""

from __future__ import annotations

import io
import math
import sys

import pytest

from texforce_ray.observability import progress
from texforce_ray.observability.progress import Progress, duration


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_one_plain_line_per_iteration(
    capsys: pytest.CaptureFixture[str], clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # set by many job systems; this is still a log
    with Progress(20, 0) as shown:
        clock[0] += 30
        shown.update(3, 0.7119, 12.34)
        shown.message("checkpoint [step-00003] written")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "iteration 3/20  reward 0.712  12.3 samples/s  left 2:50",
        "checkpoint [step-00003] written",
    ]


def test_time_left_after_resume_counts_only_this_process(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with Progress(20, 18) as shown:
        clock[0] += 60
        shown.update(19, math.nan, None)
    assert capsys.readouterr().err == "iteration 19/20  reward -  - samples/s  left 1:00\n"


def test_a_terminal_gets_a_bar_and_messages_verbatim(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress(20, 0) as shown:
        shown.update(3, 0.7119, 12.34)
        shown.message("reward [bold]x[/bold] failed")
    text = terminal.getvalue()
    assert "iteration 3/20" in text
    assert "reward 0.712" in text
    assert "reward [bold]x[/bold] failed" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0:00"), (59.6, "1:00"), (250, "4:10"), (3723, "1:02:03")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
