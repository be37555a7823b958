"""Kills the writer of checkpoints at random instants; what is left must load and be as written.

    python tests/chaos/torture.py --kills 200 [--seed 0]

The writer acknowledges every checkpoint after `save_checkpoint` has returned. After each kill the
newest whole checkpoint must be one of the written states, bit for bit, and no older than the last
acknowledged one. Ends with 1 otherwise.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from texforce_ray.artifacts.snapshot import LearnerState, LoraShape, PolicySnapshot
from texforce_ray.records.checkpoint import (
    Checkpoint,
    mark_best,
    newest_checkpoint,
    prune,
    save_checkpoint,
)

KEPT = 2


@dataclass
class Outcome:
    """unreadable: no checkpoint after one was acknowledged; wrong: not a state that was written;
    lost: older than what was acknowledged; torn: kills that left a checkpoint half-written."""

    kills: int = 0
    unreadable: int = 0
    wrong: int = 0
    lost: int = 0
    torn: int = 0

    @property
    def clean(self) -> bool:
        return not (self.unreadable or self.wrong or self.lost)


def checkpoint(iteration: int) -> Checkpoint:
    """A state whose every number follows from the iteration."""
    rng = np.random.default_rng(iteration)
    tensors = {f"layer.{i}": rng.standard_normal((16, 64)).astype(np.float32) for i in range(8)}
    shapes = {"text_encoder": LoraShape(16, 16.0, ("q_proj",))}
    snapshot = PolicySnapshot(iteration, shapes, {"text_encoder": tensors})
    moments = {f"{i}/exp_avg": rng.standard_normal((16, 64)) for i in range(8)}
    state = LearnerState(iteration, 4 * iteration, moments)
    statistics = {"a prompt": rng.random(8).tolist()}
    return Checkpoint(state, (snapshot,), prompt_statistics=statistics)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    mine, theirs = one.state, other.state
    return (
        (mine.version, mine.updates) == (theirs.version, theirs.updates)
        and one.prompt_statistics == other.prompt_statistics
        and mine.optimizer.keys() == theirs.optimizer.keys()
        and all(np.array_equal(v, theirs.optimizer[k]) for k, v in mine.optimizer.items())
        and all(
            np.array_equal(v, other.snapshots[-1].adapters["text_encoder"][k])
            for k, v in one.snapshots[-1].adapters["text_encoder"].items()
        )
    )


def write_for_ever(run_dir: Path, first: int, acknowledge: int) -> None:
    """As the driver does after every iteration."""
    iteration = first
    while True:
        save_checkpoint(run_dir, checkpoint(iteration))
        os.write(acknowledge, f"{iteration}\n".encode())
        if iteration % 3 == 0:
            mark_best(run_dir, iteration, float(iteration))
        prune(run_dir, KEPT)
        iteration += 1


def torture(run_dir: Path, kills: int, seed: int) -> Outcome:
    """Kill, look, resume from what is there."""
    rng, outcome, first, acknowledged = random.Random(seed), Outcome(), 1, 0
    for _ in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(run_dir, first, writing)
            finally:
                os._exit(1)
        os.close(writing)
        time.sleep(rng.random() * 0.12)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading) as answers:
            acknowledged = max([acknowledged, *(int(line) for line in answers if line.strip())])
        outcome.kills += 1
        outcome.torn += any(run_dir.glob("checkpoints/.*.tmp"))
        found = newest_checkpoint(run_dir)
        if found is None:
            outcome.unreadable += acknowledged > 0
            continue
        outcome.wrong += not same(found, checkpoint(found.iteration))
        outcome.lost += found.iteration < acknowledged
        first = found.iteration + 1
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("texforce_ray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        outcome = torture(Path(folder), options.kills, options.seed)
    print(
        f"{outcome.kills} kills, {outcome.torn} of them while a checkpoint was half-written: "
        f"{outcome.unreadable} unreadable, {outcome.wrong} wrong, {outcome.lost} lost"
    )
    return 0 if outcome.clean else 1


if __name__ == "__main__":
    sys.exit(main())
