"""A file of the run directory is the old one or the new one, whatever fails."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.torture import checkpoint
from texforce_ray import files
from texforce_ray.errors import RunDirectoryError
from texforce_ray.records.checkpoint import save_checkpoint
from texforce_ray.records.metrics import MetricsLog


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_full_disk_keeps_old_file_and_leaves_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "state.json"
    files.atomic_write_text(path, "old")
    monkeypatch.setattr(os, failing, _no_space)
    with pytest.raises(RunDirectoryError, match=r"No space left.*free some space") as caught:
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_interrupt_while_writing_leaves_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.atomic_write_bytes(tmp_path / "a", b"1")
    assert os.listdir(tmp_path) == []


def test_colleagues_can_read_what_was_written(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        files.atomic_write_bytes(tmp_path / "deep" / "er" / "a.bin", b"\0\1")
    finally:
        os.umask(before)
    path = tmp_path / "deep" / "er" / "a.bin"
    assert path.read_bytes() == b"\0\1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_directory_without_fsync_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.atomic_write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_check_writable_makes_the_directory_and_leaves_it_empty(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "first"
    files.check_writable(run_dir)
    files.check_writable(run_dir)
    assert os.listdir(run_dir) == []


@pytest.mark.parametrize("inside", ["", "run"])
def test_check_writable_names_the_file_in_the_way(tmp_path: Path, inside: str) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"taken.*a file is where a directory"):
        files.check_writable(tmp_path / "taken" / inside)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_writable_refuses_a_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(RunDirectoryError, match="Permission denied"):
        files.check_writable(tmp_path / "run")


def test_check_writable_notices_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(RunDirectoryError, match="No space left"):
        files.check_writable(tmp_path)
    assert os.listdir(tmp_path) == []


def test_new_directories_are_synced_in_their_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.atomic_write_text(tmp_path / "run" / "samples" / "a", "x")
    assert {tmp_path, tmp_path / "run", tmp_path / "run" / "samples"} <= set(synced)
    synced.clear()
    save_checkpoint(tmp_path / "other", checkpoint(1))
    assert {tmp_path, tmp_path / "other", tmp_path / "other" / "checkpoints"} <= set(synced)
    synced.clear()
    MetricsLog(tmp_path / "other").close()
    assert tmp_path / "other" in synced, "metrics.jsonl itself is a new entry"
    synced.clear()
    files.check_writable(tmp_path / "third" / "run")
    assert {tmp_path, tmp_path / "third"} <= set(synced)
