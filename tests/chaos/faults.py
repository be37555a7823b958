"""The kinds of faults, and how each is brought about."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.cluster import Nodes

PROCESSES = {"rollout": "ray::Rollout", "reward": "ray::RewardServer", "learner": "ray::Learner"}
# From outside, by signals. These fit the real actors too, which know no traps.
SIGNALS = {
    "rollout killed": signal.SIGKILL,
    "rollout hangs": signal.SIGSTOP,
    "reward killed": signal.SIGKILL,
    "reward hangs": signal.SIGSTOP,
    "learner killed": signal.SIGKILL,
    "learner hangs": signal.SIGSTOP,
}
# From within, by traps that stand-in actors look for.
TRAPS = {
    "rollout exits": "rollout-exits",
    "rollout exits returning": "rollout-exits-returning",
    "rollout takes all memory": "rollout-memory",
    "reward exits": "reward-exits",
    "reward raises": "reward-raises",
    "reward too slow": "reward-slow",
    "learner exits": "learner-exits",
    "learner exits after the update": "learner-exits-returning",
    "clock jumps": "driver-clock",
}
NODE_REMOVED, HEAD_RESTARTED = "node removed", "head restarted"
DRIVER_KILLED, DRIVER_TERMINATED = "driver killed", "driver terminated"
DAMAGED = "newest checkpoint damaged"
# Faults that a process is born with: what breaks at which of its writes, and the most of those.
WRITES = {
    "driver killed in a checkpoint": ("die", "checkpoint", 9),
    "driver killed in a samples file": ("die", "samples", 3),
    "driver killed in a metrics line": ("die", "metrics", 3),
    "disk full in a checkpoint": ("full", "checkpoint", 9),
    "disk full in a samples file": ("full", "samples", 3),
    "disk full in a metrics line": ("full", "metrics", 3),
}
# Those that end the driver, which is then started again by command.
ENDING = (DRIVER_KILLED, DRIVER_TERMINATED, DAMAGED, HEAD_RESTARTED, *WRITES)
KINDS = (*SIGNALS, *TRAPS, NODE_REMOVED, *ENDING)
EMBEDDED_KINDS = (
    *SIGNALS,
    NODE_REMOVED,
    DRIVER_KILLED,
    DRIVER_TERMINATED,
    DAMAGED,
    "driver killed in a checkpoint",
    "disk full in a samples file",
)

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Fault:
    """One fault and its outcome.

    seconds: until the second iteration after it was done, its own work included.
    """

    kind: str
    k: int
    run: int
    recovered: bool
    seconds: float
    equal: bool


def born_with(kind: str, rng: random.Random) -> tuple[str, ...]:
    """Arguments of a job that is to break at one of its writes."""
    if kind not in WRITES:
        return ()
    what, where, most = WRITES[kind]
    return "--break", f"{what}:{where}:{rng.randint(1, most)}"


def inject(
    kind: str, run_dir: Path, job: subprocess.Popen[str], cluster: Nodes, rng: random.Random
) -> None:
    """Inject the fault now; a job that was started with one already has it."""
    if kind in SIGNALS:
        victims = cluster.processes(PROCESSES[kind.partition(" ")[0]])
        if victims:  # or the last fault's victim has not come back yet, which is a fault as well
            rng.choice(victims).send_signal(SIGNALS[kind])
    elif kind in TRAPS:
        _set_trap(run_dir.with_suffix(".traps") / TRAPS[kind], job)
    elif kind == NODE_REMOVED:
        cluster.replace(pause=rng.random() * 2)
    elif kind == HEAD_RESTARTED:
        cluster.restart_head()
    elif kind in (DRIVER_KILLED, DAMAGED):
        job.kill()
    elif kind == DRIVER_TERMINATED:
        job.send_signal(signal.SIGTERM)


def _set_trap(trap: Path, job: subprocess.Popen[str]) -> None:
    trap.parent.mkdir(exist_ok=True)
    trap.touch()
    deadline = time.monotonic() + _PATIENCE_S
    while trap.exists() and job.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no actor triggered {trap.name}")
        time.sleep(0.01)


def damage(run_dir: Path, rng: random.Random) -> None:
    """Truncate, overwrite or remove a file of the newest checkpoint."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    file = rng.choice(sorted(newest.iterdir()))
    data = bytearray(file.read_bytes())
    match rng.randrange(3):
        case 0:
            file.write_bytes(data[: len(data) // 2])
        case 1:
            data[rng.randrange(len(data))] ^= 0xFF
            file.write_bytes(data)
        case _:
            file.unlink()
