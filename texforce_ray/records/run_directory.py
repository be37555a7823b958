"""The run directory: everything that a run leaves behind. Only the driver writes it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from texforce_ray.artifacts.location import recorded_name
from texforce_ray.config import Config, recorded_paths
from texforce_ray.config.io import load_config, to_yaml
from texforce_ray.errors import ConfigError, MovedKeysError, RunDirectoryError
from texforce_ray.files import (
    atomic_write_bytes,
    atomic_write_text,
    check_writable,
    from_json,
)
from texforce_ray.records.card_info import ModelCardInfo
from texforce_ray.records.images import grid, save_png
from texforce_ray.records.metrics import MetricsLog
from texforce_ray.records.model_card import model_card
from texforce_ray.records.report import write_report
from texforce_ray.records.samples import read_samples, samples_path
from texforce_ray.records.status import State, outcome
from texforce_ray.records.tracking import open_trackers

log = logging.getLogger(__name__)

_GRID = "eval/images"
_ROW = 8  # images of a strip's row


class RunDirectory:
    """Writes a run's files; `start` iterations are already done. Holds the directory's lock."""

    def __init__(self, config: Config, lock: int, start: int) -> None:
        self.path, self._lock = Path(config.run_dir), lock
        trackers = open_trackers(config, self.path)
        self.metrics = MetricsLog(self.path, resume_from=start, trackers=trackers)

    @staticmethod
    def create(config: Config, prompts_digest: str) -> RunDirectory:
        """Start a new run's directory.

        Raises:
            RunDirectoryError: not writable, in use, or already holds a run.
        """
        path = Path(config.run_dir)
        # os.path: Path.exists() raises if a name is too long, which is reported below.
        if any(os.path.exists(path / n) for n in ("metrics.jsonl", "samples", "checkpoints")):
            raise RunDirectoryError(
                f"{path} already holds a run; continue it with --resume {path}, or choose another "
                "run_dir"
            )
        inputs = json.dumps({"prompts": prompts_digest, "base": _base(config)}) + "\n"
        return _open(config, 0, {"config.yaml": to_yaml(config), "inputs.json": inputs})

    @staticmethod
    def reopen(
        config: Config, start: int, changes: Mapping[str, tuple[Any, Any]] | None = None
    ) -> RunDirectory:
        """Continue a run's directory after `start` iterations and record `changes` of settings.

        Raises:
            RunDirectoryError: not writable, or in use.
        """
        path = Path(config.run_dir)
        files = {"config.yaml": to_yaml(config)}
        if changes:
            lines = [
                json.dumps({"after_iteration": start, "key": key, "from": old, "to": new})
                for key, (old, new) in changes.items()
            ]
            known = path / "changes.jsonl"
            earlier = known.read_text() if known.exists() else ""
            files = {"changes.jsonl": earlier + "".join(f"{line}\n" for line in lines)} | files
        directory = _open(config, start, files)
        directory._show_grid_again(start)
        return directory

    def _show_grid_again(self, version: int) -> None:
        """Send it to TensorBoard again, which hides this and later steps of older event files."""
        picture = self.path / "images" / f"step-{version:05d}.png"
        if version and picture.is_file():
            try:
                with Image.open(picture) as image:
                    self.metrics.trackers[0].add_image(_GRID, np.array(image), version)
            except (OSError, SyntaxError, ValueError) as error:
                log.warning("cannot show the grid of version %d in TensorBoard: %s", version, error)

    def recorded_mask(self, iteration: int, seeds: np.ndarray) -> np.ndarray:
        """bool [N], False for samples masked for good by an earlier attempt at this iteration."""
        path = samples_path(self.path, iteration)
        if not path.exists():
            return np.ones(len(seeds), dtype=bool)
        try:
            columns = read_samples(path)
        except (RunDirectoryError, KeyError) as error:
            log.warning("%s is damaged and will be rewritten: %s", path, error)
            return np.ones(len(seeds), dtype=bool)
        if not np.array_equal(columns["seed"], seeds):
            return np.ones(len(seeds), dtype=bool)
        return ~np.array(columns["masked"], dtype=bool)

    def write_grid(
        self, version: int, images: np.ndarray, prompts: Sequence[str], scores: np.ndarray
    ) -> None:
        """Write images/step-00012.png: the same prompts and seeds for every version.

        Also writes row-00012.png, its first images alone, for the report's strip over training.
        """
        titles = [f"{prompt} ({score:.2f})" for prompt, score in zip(prompts, scores, strict=True)]
        columns = min(8, len(images))
        picture = grid(images, columns, titles=titles, header=f"after {version} iterations")
        save_png(self.path / "images" / f"step-{version:05d}.png", picture)
        save_png(self.path / "images" / f"row-{version:05d}.png", np.hstack(list(images[:_ROW])))
        self.metrics.add_image(_GRID, picture, version)

    def write_adapter(self, files: Mapping[str, bytes], card: ModelCardInfo) -> Path:
        """Write adapter/: the exported files and a model card."""
        folder = self.path / "adapter"
        for name, data in files.items():
            atomic_write_bytes(folder / name, data)
        atomic_write_text(folder / "README.md", model_card(card))
        return folder

    def report(self) -> Path:
        """Write report.html from the directory's files."""
        return write_report(self.path)

    def close(self, state: State = "finished") -> None:
        self.metrics.close(state)
        os.close(self._lock)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(outcome(error))


def _open(config: Config, start: int, files: Mapping[str, str]) -> RunDirectory:
    """Lock the directory, then write its first files; a failure leaves it unlocked."""
    path = Path(config.run_dir)
    check_writable(path)
    lock = _acquire(path)
    try:
        _sweep(path)
        for name, text in files.items():
            atomic_write_text(path / name, text)
        return RunDirectory(config, lock, start)
    except BaseException:
        os.close(lock)  # in a notebook, the process survives and may try again
        raise


def _sweep(path: Path) -> None:
    """Remove half-written files of a killed process; complete files never have such names."""
    for stale in path.rglob(".*.tmp"):
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


def _acquire(path: Path) -> int:
    """Lock a run directory against a second writer; the lock ends with the process."""
    descriptor = os.open(path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunDirectoryError(
            f"{path} is being written by another run; wait for it to end, or choose another run_dir"
        ) from None
    except OSError as error:  # a file system without locks must not stop the run
        log.warning("cannot lock %s (%s); do not start a second run in it", path, error)
    return descriptor


def read_config(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of an existing run, with `free` fields overridden.

    Raises:
        RunDirectoryError: not a run, or an override changes a result-affecting field.
        ConfigError: an override is invalid.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise RunDirectoryError(f"{run_dir} is not a run: it holds no config.yaml")
    try:
        before = load_config(file, stored=True)
    except MovedKeysError as error:
        raise RunDirectoryError(
            f"{run_dir} was made by an earlier version and cannot be continued or evaluated as a "
            f"run; its adapter can: lora.init={run_dir / 'adapter'} starts a new run from it; "
            f"in detail, {error}"
        ) from None
    except ConfigError as error:
        raise RunDirectoryError(f"{file} is damaged or from another version: {error}") from None
    own = {"run_dir": str(run_dir.absolute())}
    now = load_config(file, overrides, plain=own, stored=True)
    check_same(before, now, run_dir)
    return now


def check_resumable(config: Config, prompts_digest: str) -> dict[str, tuple[Any, Any]]:
    """Raise RunDirectoryError unless `config.run_dir` is a run of the same config and prompts.

    Returns the fields that differ but may change: old and new values.
    """
    path = Path(config.run_dir)
    changes = check_same(read_config(path), config, path)
    try:
        before = from_json((path / "inputs.json").read_text())
        prompts, base = before["prompts"], before.get("base")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return changes  # damaged: comparing the config has to be enough
    if base != _base(config):
        raise RunDirectoryError(
            f"{path} was trained on an earlier version of the embedded pipeline, whose weights "
            "have been replaced since; start a new run, or resume with the version of texforce-ray "
            "that it was started with"
        )
    if prompts != prompts_digest:
        raise RunDirectoryError(
            f"the prompts of {path} have changed since it started (prompts.train or eval.prompts); "
            "restore the old file, or start a new run"
        )
    return changes


def _base(config: Config) -> str | None:
    """Which weights 'embedded' stands for; other models are identified by their path alone."""
    return recorded_name("embedded") if config.model.path == "embedded" else None


def digest(prompts: Sequence[Any]) -> str:
    """SHA-256 of prompts with their metadata."""
    return hashlib.sha256(repr(list(prompts)).encode()).hexdigest()


def check_same(before: Config, now: Config, run_dir: Path) -> dict[str, tuple[Any, Any]]:
    """Changes of fields that may change: key to old and new value.

    Raises:
        RunDirectoryError: other result-affecting fields differ; names them.
    """
    old, new = _flat(before.fixed()), _flat(now.fixed())
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    allowed = recorded_paths()
    changes = {key: (old.get(key), new.get(key)) for key in different if _plain(key) in allowed}
    if wrong := [key for key in different if key not in changes]:
        lines = [f"  {key}: was {old.get(key)!r}, now {new.get(key)!r}" for key in wrong]
        raise RunDirectoryError(
            "\n".join(
                [
                    f"{run_dir} was started with another configuration; to resume it, keep:",
                    *lines,
                    f"(these may change: {', '.join(sorted(allowed))})",
                ]
            )
        )
    return changes


def _plain(key: str) -> str:
    return ".".join(part for part in key.split(".") if not part.isdigit())


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {
            k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}{name}.").items()
        }
    if isinstance(tree, list) and tree:
        return {k: v for i, sub in enumerate(tree) for k, v in _flat(sub, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): tree}
