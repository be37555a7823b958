"""`metrics.jsonl`, one line per iteration, and the same numbers for TensorBoard and others."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from texforce_ray.errors import RunDirectoryError
from texforce_ray.files import (
    atomic_write_bytes,
    from_json,
    fsync_directory,
    make_directory,
    write_error,
)
from texforce_ray.records.status import State
from texforce_ray.records.tensorboard import TensorBoardLog
from texforce_ray.records.tracking import Tracker

FILE_NAME = "metrics.jsonl"
Value = float | int | str | None


class MetricsLog:
    """Appends to `metrics.jsonl` and `tensorboard/` of a run directory.

    Args:
        run_dir: the run directory; made if missing.
        resume_from: the iteration that the resumed run starts with. Lines of it and of later
            ones are dropped, because they will be written again.
        trackers: receive the same numbers and images; more may be added to `trackers` later.

    A half-written last line, left by a crash, is dropped on opening.

    Raises:
        RunDirectoryError: the file cannot be written, or an earlier line is not a metrics line.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_from: int | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        run_dir = Path(run_dir)
        self._path = run_dir / FILE_NAME
        _repair(self._path, resume_from)
        self._open()
        tensorboard = TensorBoardLog(run_dir / "tensorboard", purge_from=resume_from)
        self.trackers: list[Tracker] = [tensorboard, *trackers]
        self._histories = tuple(self.trackers)  # those added later show only the live run

    def append(self, iteration: int, values: Mapping[str, Value]) -> None:
        """Write the line of `iteration`; it is on disk when this returns.

        NaN and infinities become null, since JSON has neither; trackers get them unchanged.
        Strings and None are not sent to trackers.

        Raises:
            RunDirectoryError: the line could not be written; the file is left without it.
            TypeError: a value is not a number, text or None.
        """
        plain = {key: _plain(key, value) for key, value in values.items()}
        self._append_line(_encoded({"iteration": int(iteration), **plain}))
        _send(self.trackers, plain, iteration)

    def amend(self, iteration: int, values: Mapping[str, Value]) -> None:
        """Add `values` to the line of `iteration`, which must already be written.

        TensorBoard and the constructor's trackers, which keep a history, get them too.

        Raises:
            RunDirectoryError: the file could not be replaced; it is unchanged.
        """
        plain = {key: _plain(key, value) for key, value in values.items()}
        lines = [
            _encoded({**record, **plain}) if record["iteration"] == iteration else line + b"\n"
            for record, line in _parse(self._path, _read(self._path))
        ]
        self._file.close()
        try:
            atomic_write_bytes(self._path, b"".join(lines))
        finally:
            self._open()
        _send(self._histories, plain, iteration)

    def add_image(self, tag: str, image: NDArray[np.uint8], iteration: int) -> None:
        """Show `image` (uint8 `[H,W,3]`) in TensorBoard and other trackers under `tag`."""
        for tracker in self.trackers:
            tracker.add_image(tag, image, iteration)

    def close(self, state: State = "finished") -> None:
        """Close the files and pass the final state to the trackers. Safe to call twice."""
        self._file.close()
        for tracker in self.trackers:
            tracker.close(state)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        try:
            make_directory(self._path.parent)
            new = not self._path.exists()
            # Unbuffered: a buffered file would retry a failed line when it is closed.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - see close()
            if new:
                fsync_directory(self._path.parent)
        except OSError as error:
            raise write_error(self._path, error) from error

    def _append_line(self, line: bytes) -> None:
        descriptor = self._file.fileno()
        size = os.fstat(descriptor).st_size
        try:
            rest = memoryview(line)
            while rest:  # a write may be partial, e.g. when the disk is nearly full
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise write_error(self._path, error) from error


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` in order; without the file, an empty list.

    Safe while a run is writing: a half-written last line is left out.

    Raises:
        RunDirectoryError: the file cannot be read, or a line before the last is damaged.
    """
    path = Path(run_dir) / FILE_NAME
    return [record for record, _ in _parse(path, _read(path))]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise RunDirectoryError(
            f"cannot read {path}: {error}; check the path and its permissions"
        ) from error


def _repair(path: Path, resume_from: int | None) -> None:
    old = _read(path)
    kept = [
        line
        for record, line in _parse(path, old)
        if resume_from is None or record["iteration"] < resume_from
    ]
    new = b"".join(line + b"\n" for line in kept)
    if new != old:
        atomic_write_bytes(path, new)


def _parse(path: Path, data: bytes) -> list[tuple[dict[str, Any], bytes]]:
    """Return each line as parsed and as written."""
    lines = data.split(b"\n")
    while lines and not lines[-1]:
        lines.pop()
    parsed = []
    for index, line in enumerate(lines):
        try:
            record = from_json(line.decode("utf-8"))
            valid = isinstance(record, dict) and isinstance(record.get("iteration"), int)
        except ValueError:  # not JSON, or not UTF-8
            valid = False
        if valid:
            parsed.append((record, line))
        elif index < len(lines) - 1:
            raise RunDirectoryError(
                f"{path}: line {index + 1} is not a metrics line: {line[:80]!r}; a crash can cut "
                "short only the last line, so something else changed this file: remove the line, "
                "or restore the file"
            )
    return parsed


def _send(trackers: Sequence[Tracker], plain: Mapping[str, Value], iteration: int) -> None:
    scalars = {key: float(v) for key, v in plain.items() if isinstance(v, (int, float))}
    for tracker in trackers:
        tracker.add_scalars(scalars, iteration)


def _encoded(record: Mapping[str, Value]) -> bytes:
    line = {key: _finite_or_none(value) for key, value in record.items()}
    return json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(key: str, value: Any) -> Value:
    if key == "iteration":
        raise ValueError("the metric name 'iteration' is reserved for the line's own number")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (int, float, str)):
        return value
    raise TypeError(f"metric {key!r} must be a number, text or None, got {type(value).__name__}")


def _finite_or_none(value: Value) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
