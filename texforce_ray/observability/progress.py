"""Progress on stderr: a live bar in a terminal, one plain line per iteration in a job's log."""

from __future__ import annotations

import math
import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows iteration, reward, samples per second and the time left. A context manager.

    Args:
        iterations: iterations of the whole run.
        start: iterations already done when this process begins (0, or where it resumes).
    """

    def __init__(self, iterations: int, start: int = 0) -> None:
        self._iterations = iterations
        self._start = start
        self._began = time.monotonic()
        self._bar: RichProgress | None = None
        # Not Console.is_terminal: FORCE_COLOR makes it true in job logs, and a live bar there
        # is thousands of lines of control codes.
        if sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
            self._bar = _bar()
            self._task = self._bar.add_task("", total=iterations, completed=start, figures="")

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self, iteration_done: int, reward: float | None, samples_per_second: float | None
    ) -> None:
        """Show that `iteration_done` iterations of the whole run are finished.

        Args:
            iteration_done: counts from 1, so the last one equals `iterations`.
            reward: mean reward of the iteration; NaN or None if there is none.
            samples_per_second: likewise.
        """
        figures = "  ".join(
            (
                f"reward {_number(reward, 3)}",
                f"{_number(samples_per_second, 1)} samples/s",
                f"left {duration(self._seconds_left(iteration_done))}",
            )
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration_done, figures=figures)
        else:
            self._line(f"iteration {iteration_done}/{self._iterations}  {figures}")

    def message(self, text: str) -> None:
        """Show a line of text, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._line(text)

    def _seconds_left(self, done: int) -> float | None:
        here = done - self._start
        if here <= 0:
            return None
        return (time.monotonic() - self._began) / here * max(self._iterations - done, 0)

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float | None) -> str:
    """Return e.g. "0:09", "4:10" or "1:02:03"; "-" for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _bar() -> RichProgress:
    return RichProgress(
        TextColumn("iteration {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}", markup=False),
        console=Console(stderr=True),
        expand=True,
        # Rich would send prints to stderr; leave them alone if stdout is a file or pipe.
        redirect_stdout=sys.stdout.isatty(),
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
