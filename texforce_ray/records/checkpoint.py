"""Checkpoints: all that a run needs to resume with the same bits. safetensors and JSON, no pickle.

A checkpoint is written to a temporary directory, synced, marked complete with the digests of its
files, and renamed. Readers accept only checkpoints with a matching marker.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from texforce_ray.artifacts.snapshot import (
    Learned,
    LearnerState,
    LoraShape,
    PolicySnapshot,
    Tensors,
)
from texforce_ray.errors import CheckpointError
from texforce_ray.files import (
    atomic_write_text,
    from_json,
    fsync_directory,
    make_directory,
    write_error,
)

log = logging.getLogger(__name__)

_MARKER = "COMPLETE.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state after `state.version` finished iterations.

    snapshots: the newest max_staleness + 1 policy versions, oldest first; the last one is the
    current policy. average: see `Learned`.
    prompt_statistics: remembered rewards of each prompt. reward_weights: the weights behind these
    totals, by reward.
    """

    state: LearnerState
    snapshots: tuple[PolicySnapshot, ...]
    average: PolicySnapshot | None = None
    prompt_statistics: dict[str, list[float]] = field(default_factory=dict)
    reward_weights: dict[str, float] = field(default_factory=dict)

    @property
    def iteration(self) -> int:
        return self.state.version

    @property
    def learned(self) -> Learned:
        """What a learner continues from."""
        return Learned(self.snapshots[-1], self.state, self.average)


def checkpoint_path(run_dir: Path, iteration: int) -> Path:
    return run_dir / "checkpoints" / f"step-{iteration:05d}"


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; after a crash at any point, it is either complete or absent.

    Raises:
        RunDirectoryError: writing failed; earlier checkpoints are untouched.
    """
    final = checkpoint_path(run_dir, checkpoint.iteration)
    if is_complete(final):
        return final
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        make_directory(temporary)
        digests = {}
        for name, data in _files(checkpoint).items():
            _write(temporary / name, data)
            digests[name] = hashlib.sha256(data).hexdigest()
        _write(temporary / _MARKER, json.dumps(digests).encode())
        fsync_directory(temporary)
        if final.exists():  # incomplete, or is_complete would have returned above
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync_directory(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise write_error(final, error) from error
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        CheckpointError: incomplete or damaged.
    """
    if not is_complete(path):
        raise CheckpointError(f"checkpoint {path} is incomplete or damaged")
    try:
        meta = from_json((path / "state.json").read_text())
        learner = load_file(path / "learner.safetensors")
        state = LearnerState(
            version=meta["version"],
            updates=meta["updates"],
            optimizer=_inner(learner, "optimizer/"),
            skipped=meta["skipped"],
            own=_inner(learner, "objective/"),
        )
        snapshots = [
            _read_snapshot(path / f"snapshot-{i}.safetensors", facts)
            for i, facts in enumerate(meta["snapshots"])
        ]
        statistics = {k: [float(r) for r in v] for k, v in meta["prompt_statistics"].items()}
        weights = _weights(meta["reward_weights"])
        average = snapshots.pop() if meta["averaged"] else None
        if not snapshots:
            raise ValueError("it has no snapshot of the policy")
    except (OSError, LookupError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    return Checkpoint(state, tuple(snapshots), average, statistics, weights)


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest intact checkpoint; damaged ones are skipped with a warning."""
    for path in reversed(checkpoints(run_dir)):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s; trying the previous one", error)
    return None


def is_complete(path: Path) -> bool:
    """Whether a checkpoint has its marker and every file matches its digest there."""
    try:
        digests = from_json((path / _MARKER).read_text())
        return bool(digests) and all(
            hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
            for name, digest in digests.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


class Whole:
    """Tells which checkpoints are complete; hashes one again only if a file of it has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[Any, ...]] = {}

    def __call__(self, path: Path) -> bool:
        try:
            now = tuple((f.name, *_stamp(f)) for f in sorted(path.iterdir()))
        except OSError:
            return False
        if self._known.get(path) != now:
            if not is_complete(path):
                return False
            self._known[path] = now
        return True


def _stamp(file: Path) -> tuple[int, int, int]:
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def prune(run_dir: Path, keep_last: int, whole: Callable[[Path], bool] = is_complete) -> None:
    """Delete checkpoints that are `whole`, except the newest `keep_last` and the best one."""
    best = read_best(run_dir)
    keep = {best["iteration"]} if best else set()
    # A damaged one does not count: it must not displace one that can still be read.
    found = [path for path in checkpoints(run_dir) if whole(path)]
    for path in found[:-keep_last]:
        if step_of(path) not in keep:
            shutil.rmtree(path, ignore_errors=True)


def mark_best(
    run_dir: Path, iteration: int, score: float, weights: Mapping[str, float] | None = None
) -> bool:
    """Record the checkpoint of `iteration` as the best if its score beats the recorded one.

    `weights` of the rewards identify the score's scale; a score on another scale is replaced.
    """
    weights, best = dict(weights or {}), read_best(run_dir)
    if not math.isfinite(score):
        return False
    if best and best["score"] >= score and best["weights"] in ({}, weights):
        return False
    text = json.dumps({"iteration": iteration, "score": score, "weights": weights})
    atomic_write_text(_best_file(run_dir), text)
    return True


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """{"iteration", "score", "weights"} of the best checkpoint so far."""
    try:
        best = from_json(_best_file(run_dir).read_text())
        return {
            "iteration": int(best["iteration"]),
            "score": float(best["score"]),
            "weights": _weights(best.get("weights", {})),
        }
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError):
        return None


def forget_best(run_dir: Path) -> None:
    """Delete the record of the best checkpoint."""
    _best_file(run_dir).unlink(missing_ok=True)


def _best_file(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "best.json"


def _weights(found: Any) -> dict[str, float]:
    return {str(name): float(weight) for name, weight in found.items()}


def checkpoints(run_dir: Path) -> list[Path]:
    """All checkpoint directories, complete or not, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.name.partition("-")[2].isdigit()), key=step_of)


def step_of(path: Path) -> int:
    """The number of finished iterations in a checkpoint's name."""
    return int(path.name.partition("-")[2])


def _files(checkpoint: Checkpoint) -> dict[str, bytes]:
    state = checkpoint.state
    learner = {f"optimizer/{key}": value for key, value in state.optimizer.items()}
    learner |= {f"objective/{key}": value for key, value in state.own.items()}
    average = checkpoint.average
    snapshots = [*checkpoint.snapshots, *([] if average is None else [average])]
    meta = {
        "version": state.version,
        "updates": state.updates,
        "skipped": state.skipped,
        "averaged": average is not None,
        "prompt_statistics": checkpoint.prompt_statistics,
        "reward_weights": checkpoint.reward_weights,
        "snapshots": [
            {
                "version": s.version,
                "shapes": {part: asdict(shape) for part, shape in s.shapes.items()},
            }
            for s in snapshots
        ],
    }
    files = {"state.json": json.dumps(meta).encode(), "learner.safetensors": _pack(learner)}
    for i, snapshot in enumerate(snapshots):
        tensors = {f"{p}/{k}": v for p, t in snapshot.adapters.items() for k, v in t.items()}
        files[f"snapshot-{i}.safetensors"] = _pack(tensors)
    return files


def _read_snapshot(path: Path, facts: dict[str, Any]) -> PolicySnapshot:
    shapes = {
        part: LoraShape(shape["rank"], shape["alpha"], tuple(shape["target_modules"]))
        for part, shape in facts["shapes"].items()
    }
    return PolicySnapshot(facts["version"], shapes, _nested(load_file(path), ""))


def _pack(tensors: Tensors) -> bytes:
    return save({key: np.asarray(value, order="C") for key, value in tensors.items()})


def _inner(tensors: Tensors, prefix: str) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _nested(tensors: Tensors, prefix: str) -> dict[str, Tensors]:
    nested: dict[str, Tensors] = {}
    for key, value in _inner(tensors, prefix).items():
        part, _, name = key.partition("/")
        nested.setdefault(part, {})[name] = value
    return nested


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
