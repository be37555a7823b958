"""Breaks runs on purpose and compares what they end with, bit for bit, with runs left alone.

    python tests/chaos/drill.py --faults 200 --out runs/chaos [--seed 0]

Faults are drawn from all kinds, several to a run. Goes on where it stopped: OUT/faults.jsonl has a
line for each. Prints a table; ends with 1 if a run did not end, or not with the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
JOB = Path(__file__).parent / "job.py"
ITERATIONS = 16
DEADLINE_S = 180.0
PROCESSES = {"rollout": "ray::Rollout", "reward": "ray::RewardServer", "learner": "ray::Learner"}
KINDS = (
    "rollout killed",
    "rollout hangs",
    "reward killed",
    "reward hangs",
    "learner killed",
    "learner hangs",
    "node removed",
    "driver killed",
    "driver terminated",
    "driver killed in a checkpoint",
    "driver killed in a samples file",
    "disk full in a checkpoint",
    "disk full in a samples file",
    "disk full in a metrics line",
    "newest checkpoint damaged",
)
# Those that end the driver, which is then started again by command.
ENDING = KINDS[7:]


# Two runs of five faults: actors' with k = 0, the driver's with k = 1.
SHORT = (
    (0, ["rollout killed", "reward killed", "learner killed", "rollout hangs", "node removed"]),
    (
        1,
        [
            "driver killed in a checkpoint",
            "disk full in a samples file",
            "driver terminated",
            "newest checkpoint damaged",
            "learner hangs",
        ],
    ),
)


@dataclass(frozen=True)
class Fault:
    """One fault and what came of it."""

    kind: str
    k: int
    run: int
    recovered: bool
    seconds: float
    equal: bool


class Nodes:
    """A cluster of two nodes; rollout actors live on the second, which can be taken away."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 2, "object_store_memory": 200_000_000, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self.cluster.address
        self.other = self._add()

    def replace(self) -> None:
        """Take the second node away without grace, and bring another."""
        old, self.other = self.other, self._add()
        self.cluster.remove_node(old, allow_graceful=False)

    def _add(self) -> Any:
        return self.cluster.add_node(
            num_cpus=1, resources={"rollout": 2}, object_store_memory=200_000_000
        )


@contextmanager
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    try:
        yield found
    finally:
        found.cluster.shutdown()


def start(run_dir: Path, k: int, address: str, *more: str) -> subprocess.Popen[str]:
    """A job's process."""
    log = run_dir.with_suffix(".log").open("a")
    command = [sys.executable, str(JOB), str(run_dir), "--k", str(k), "--address", address, *more]
    command += ["--iterations", str(ITERATIONS)]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def undisturbed(folder: Path, k: int, address: str) -> Path:
    """The run that all others are compared with."""
    path = folder / f"undisturbed-{k}"
    if not (path / "adapter" / "adapter_model.safetensors").exists():
        shutil.rmtree(path, ignore_errors=True)
        code = start(path, k, address).wait(DEADLINE_S)
        assert code == 0, path.with_suffix(".log").read_text()
    return path


def result(run_dir: Path) -> dict[str, bytes]:
    """What has to be equal: the adapter and every sample."""
    files = [run_dir / "adapter" / "adapter_model.safetensors"]
    files += sorted((run_dir / "samples").glob("*.parquet"))
    return {path.name: path.read_bytes() for path in files}


def disturbed(
    folder: Path, number: int, k: int, kinds: Sequence[str], cluster: Nodes, rng: random.Random
) -> list[Fault]:
    """One run with these faults; an ending one goes last of those before the next start."""
    run_dir = folder / f"run-{number}"
    shutil.rmtree(run_dir, ignore_errors=True)
    reference = result(undisturbed(folder, k, cluster.address))
    seconds: list[float] = []
    process = start(run_dir, k, cluster.address, *_broken(kinds[0], rng))
    code: int | None = None
    try:
        for place, kind in enumerate(kinds):
            began = _wait_for_progress(run_dir, process, rng)
            _inject(kind, run_dir, process, cluster, rng)
            if kind in ENDING:
                code = process.wait(DEADLINE_S)
                expected = 130 if kind == "driver terminated" else None
                assert code != 0, f"{kind}: the run ended as if nothing had happened"
                assert expected in (None, code), f"{kind}: exit code {code}"
                if kind == "newest checkpoint damaged":
                    _damage(run_dir, rng)
                following = kinds[place + 1] if place + 1 < len(kinds) else ""
                process = start(run_dir, k, cluster.address, "--resume", *_broken(following, rng))
            _wait_for_line(run_dir, process)
            seconds.append(time.monotonic() - began)
        code = process.wait(DEADLINE_S)
    except (AssertionError, subprocess.TimeoutExpired, TimeoutError) as error:
        print(f"{run_dir}: {error}", file=sys.stderr)
    finally:
        if process.poll() is None:
            process.kill()
    equal = code == 0 and result(run_dir) == reference
    seconds += [DEADLINE_S] * (len(kinds) - len(seconds))
    return [
        Fault(kind, k, number, code == 0, took, equal)
        for kind, took in zip(kinds, seconds, strict=True)
    ]


def _broken(kind: str, rng: random.Random) -> tuple[str, ...]:
    """Faults that a process is born with: it breaks at one of its writes."""
    what = "die" if kind.startswith("driver killed in") else "full"
    for name, where, most in (
        ("a checkpoint", "checkpoint", 9),
        ("a samples file", "samples", 3),
        ("a metrics line", "metrics", 3),
    ):
        if kind.endswith(f"in {name}"):
            return "--break", f"{what}:{where}:{rng.randint(1, most)}"
    return ()


def _inject(
    kind: str, run_dir: Path, process: subprocess.Popen[str], cluster: Nodes, rng: random.Random
) -> None:
    role, _, what = kind.partition(" ")
    if role in PROCESSES:
        found = [p for p in psutil.process_iter(["name", "cmdline"]) if _is(p, PROCESSES[role])]
        victim = rng.choice(sorted(found, key=lambda p: p.pid))
        victim.send_signal(signal.SIGKILL if what == "killed" else signal.SIGSTOP)
    elif kind == "node removed":
        cluster.replace()
    elif kind in ("driver killed", "newest checkpoint damaged"):
        process.kill()
    elif kind == "driver terminated":
        process.send_signal(signal.SIGTERM)


def _is(process: psutil.Process, title: str) -> bool:
    with_title = " ".join(process.info["cmdline"] or [])
    return with_title.startswith(title) and process.status() != psutil.STATUS_ZOMBIE


def _damage(run_dir: Path, rng: random.Random) -> None:
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


def _lines(run_dir: Path) -> int:
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _wait_for_progress(run_dir: Path, process: subprocess.Popen[str], rng: random.Random) -> float:
    """Until the run has begun, and a random moment longer; the time of the fault."""
    _wait_for_line(run_dir, process)
    time.sleep(rng.random() * 0.5)
    return time.monotonic()


def _wait_for_line(run_dir: Path, process: subprocess.Popen[str]) -> None:
    """Until another iteration is done, or the process has ended."""
    before, deadline = _lines(run_dir), time.monotonic() + DEADLINE_S
    while _lines(run_dir) <= before and process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no iteration within {DEADLINE_S:.0f} s")
        time.sleep(0.02)


def scenarios(faults: int, seed: int) -> list[tuple[int, list[str]]]:
    """Runs of up to three faults, every kind equally often: k and the kinds of each."""
    rng = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < faults:
        drawn += rng.sample(KINDS, len(KINDS))
    drawn = drawn[:faults]
    return [(i // 3 % 2, drawn[i : i + 3]) for i in range(0, faults, 3)]


def table(faults: Sequence[Fault]) -> list[str]:
    lines = [
        "| fault | times | recovered | bits equal | median s | worst s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        of = [fault for fault in faults if fault.kind == kind]
        if of:
            took = [fault.seconds for fault in of]
            lines.append(
                f"| {kind} | {len(of)} | {sum(f.recovered for f in of)} | "
                f"{sum(f.equal for f in of)} | {median(took):.1f} | {max(took):.1f} |"
            )
    lines.append(
        f"| all | {len(faults)} | {sum(f.recovered for f in faults)} | "
        f"{sum(f.equal for f in faults)} | {median(f.seconds for f in faults):.1f} | "
        f"{max(f.seconds for f in faults):.1f} |"
    )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=12)
    parser.add_argument("--short", action="store_true", help="two fixed runs of five faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "chaos")
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "token"
    folder = options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "faults.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    done = [Fault(**json.loads(line)) for line in lines]
    finished = {fault.run for fault in done}
    planned = SHORT if options.short else scenarios(options.faults, options.seed)
    with nodes() as cluster:
        for number, (k, kinds) in enumerate(planned):
            if number in finished:
                continue
            rng = random.Random(options.seed * 100_003 + number)
            found = disturbed(folder, number, k, kinds, cluster, rng)
            done += found
            with record.open("a") as file:
                file.writelines(json.dumps(asdict(fault)) + "\n" for fault in found)
            for fault in found:
                print(f"{number}: {fault}", flush=True)
    print("\n".join(table(done)))
    return 0 if all(fault.equal for fault in done) else 1


if __name__ == "__main__":
    sys.exit(main())
