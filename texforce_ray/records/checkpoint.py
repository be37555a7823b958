"""Checkpoints: all that a run needs to go on with the same bits. safetensors and JSON, no pickle.

A checkpoint is written to a temporary directory, synced, marked complete with the digests of its
files, and renamed. A reader believes only what carries a matching marker.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from texforce_ray.errors import CheckpointError
from texforce_ray.model.snapshot import LearnerState, LoraShape, PolicySnapshot, Tensors
from texforce_ray.records.files import atomic_write_text, from_json, fsync_directory, write_error

log = logging.getLogger(__name__)

_MARKER = "COMPLETE.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state after `state.version` finished iterations.

    snapshots: the newest max_staleness + 1 policy versions, oldest first; the last one is the
    current policy. evaluation: the averaged adapter if there is EMA, else the current one.
    prompt_statistics: remembered rewards of each prompt.
    """

    state: LearnerState
    snapshots: tuple[PolicySnapshot, ...]
    evaluation: PolicySnapshot
    prompt_statistics: dict[str, list[float]] = field(default_factory=dict)

    @property
    def iteration(self) -> int:
        return self.state.version


def checkpoint_path(run_dir: Path, iteration: int) -> Path:
    return run_dir / "checkpoints" / f"step-{iteration:05d}"


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; after a crash at any point it is there whole or not at all.

    Raises:
        RunDirectoryError: the file system refused; earlier checkpoints are untouched.
    """
    final = checkpoint_path(run_dir, checkpoint.iteration)
    if is_complete(final):
        return final
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
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
            adapters=_nested(learner, "adapters/"),
            optimizer=_inner(learner, "optimizer/"),
            ema=_nested(learner, "ema/"),
            skipped=meta.get("skipped", 0),
        )
        snapshots = [
            _read_snapshot(path / f"snapshot-{i}.safetensors", facts)
            for i, facts in enumerate(meta["snapshots"])
        ]
        statistics = {k: [float(r) for r in v] for k, v in meta["prompt_statistics"].items()}
        *earlier, evaluation = snapshots
    except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    return Checkpoint(state, tuple(earlier), evaluation, statistics)


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named in a warning and passed over."""
    for path in reversed(checkpoints(run_dir)):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    return None


def is_complete(path: Path) -> bool:
    """Whether a checkpoint carries its marker and every file has the digest that it names."""
    try:
        digests = from_json((path / _MARKER).read_text())
        return bool(digests) and all(
            hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
            for name, digest in digests.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def prune(run_dir: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one."""
    best = read_best(run_dir)
    keep = {best["iteration"]} if best else set()
    # A damaged one does not count: it must not push out what can still be read.
    whole = [path for path in checkpoints(run_dir) if is_complete(path)]
    for path in whole[:-keep_last]:
        if step_of(path) not in keep:
            shutil.rmtree(path, ignore_errors=True)


def mark_best(run_dir: Path, iteration: int, score: float) -> bool:
    """Note the checkpoint of `iteration` as the best one, if its evaluation beats the noted one."""
    best = read_best(run_dir)
    if not math.isfinite(score) or (best and best["score"] >= score):
        return False
    text = json.dumps({"iteration": iteration, "score": score})
    atomic_write_text(run_dir / "checkpoints" / "best.json", text)
    return True


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """{"iteration", "score"} of the best checkpoint so far."""
    try:
        best = from_json((run_dir / "checkpoints" / "best.json").read_text())
        return {"iteration": int(best["iteration"]), "score": float(best["score"])}
    except (OSError, ValueError, OverflowError, KeyError, TypeError):
        return None


def checkpoints(run_dir: Path) -> list[Path]:
    """All checkpoint directories, whole or not, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.name.partition("-")[2].isdigit()), key=step_of)


def step_of(path: Path) -> int:
    """The number of finished iterations that a checkpoint's name says."""
    return int(path.name.partition("-")[2])


def _files(checkpoint: Checkpoint) -> dict[str, bytes]:
    state = checkpoint.state
    learner = {f"optimizer/{key}": value for key, value in state.optimizer.items()}
    for group, parts in (("adapters", state.adapters), ("ema", state.ema)):
        learner |= {f"{group}/{p}/{k}": v for p, t in parts.items() for k, v in t.items()}
    snapshots = [*checkpoint.snapshots, checkpoint.evaluation]
    meta = {
        "version": state.version,
        "updates": state.updates,
        "skipped": state.skipped,
        "prompt_statistics": checkpoint.prompt_statistics,
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
