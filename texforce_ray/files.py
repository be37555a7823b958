"""Atomic writes: a file is either the old one or the new one, never half of each."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

from texforce_ray.errors import RunDirectoryError

# Some network and FUSE file systems cannot fsync a directory; the rename itself is still atomic.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EISDIR}


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` with `data`; missing parent directories are created.

    After a crash at any point `path` holds the old content or the new one. On failure the
    temporary file is removed and the old file stays.

    Raises:
        RunDirectoryError: the write failed (no space, no permission); the cause is the
            `OSError`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        make_directory(path.parent)
        try:
            # Not tempfile: its mode 0600 would hide the run from the user's colleagues.
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def atomic_write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in UTF-8. See `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent)


def from_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: not JSON, not UTF-8, or nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def fsync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power cut, if the file system supports that.

    Raises:
        OSError: the disk failed.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Create `directory` and its missing parents so that they survive a power cut.

    A new directory is an entry in its parent: unless the parent is synced too, the directory can
    be lost with everything that was synced in it.

    Raises:
        OSError: it cannot be created.
    """
    directory = Path(directory)
    if directory.is_dir():
        return
    if not directory.parent.is_dir():
        make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    fsync_directory(directory.parent)


def check_writable(run_dir: Path) -> None:
    """Create `run_dir` and write, sync and remove a small file in it, before any work is done.

    Raises:
        RunDirectoryError: it cannot be created or written.
    """
    run_dir = Path(run_dir)
    probe = run_dir / f".writable.{secrets.token_hex(4)}.tmp"
    try:
        make_directory(run_dir)
        try:
            with open(probe, "xb") as file:
                file.write(b"\0" * 4096)  # an empty file fits even on a full disk
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(run_dir, error) from error


def write_error(path: Path, error: OSError) -> RunDirectoryError:
    """Return the error to raise when writing `path` failed with `error`."""
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        advice = "a file is where a directory is needed: move it away or choose another run_dir"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space, then resume the run, or choose another run_dir"
    elif error.errno == errno.ENAMETOOLONG:
        advice = "choose a shorter run_dir"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "choose a run_dir that this user can write to, or change its permissions"
    else:
        advice = "check the disk or mount, then resume the run, or choose another run_dir"
    return RunDirectoryError(f"cannot write {path}: {error}; {advice}")
