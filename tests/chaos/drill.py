"""Breaks runs on purpose and compares what they end with, bit for bit, with runs left alone.

    python tests/chaos/drill.py --faults 200 --out runs/chaos [--seed 0] [--embedded]

Faults are drawn from all kinds, several to a run. Goes on where it stopped: OUT/faults.jsonl has a
line for each. Prints a table; ends with 1 if a run did not end, or not with the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.chaos.cluster import Nodes, nodes  # noqa: E402
from tests.chaos.faults import (  # noqa: E402
    DAMAGED,
    DRIVER_TERMINATED,
    EMBEDDED_KINDS,
    ENDING,
    KINDS,
    Fault,
    born_with,
    damage,
    inject,
)

JOB = Path(__file__).parent / "job.py"
ITERATIONS = 30
PER_RUN = 6  # faults
DEADLINE_S = 240.0

# Two runs of five faults: actors' with k = 0, the driver's with k = 1.
SHORT = (
    (
        0,
        [
            "rollout killed",
            "reward raises",
            "learner exits after the update",
            "rollout hangs",
            "node removed",
        ],
    ),
    (
        1,
        [
            "driver killed in a checkpoint",
            "disk full in a samples file",
            "driver terminated",
            "newest checkpoint damaged",
            "clock jumps",
        ],
    ),
)


def start(
    run_dir: Path, k: int, cluster: Nodes, embedded: bool, *more: str
) -> subprocess.Popen[str]:
    """A job's process."""
    log = run_dir.with_suffix(".log").open("a")
    command = [sys.executable, str(JOB), str(run_dir), "--k", str(k), "--address", cluster.address]
    command += ["--iterations", str(ITERATIONS), *more, *(["--embedded"] if embedded else [])]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def undisturbed(folder: Path, k: int, cluster: Nodes, embedded: bool) -> Path:
    """The run that all others are compared with."""
    path = folder / f"undisturbed-{k}"
    if not (path / "adapter" / "adapter_model.safetensors").exists():
        shutil.rmtree(path, ignore_errors=True)
        code = start(path, k, cluster, embedded).wait(2 * DEADLINE_S)
        assert code == 0, path.with_suffix(".log").read_text()
    return path


def result(run_dir: Path) -> dict[str, bytes]:
    """What has to be equal: the adapter and every sample."""
    files = [run_dir / "adapter" / "adapter_model.safetensors"]
    files += sorted((run_dir / "samples").glob("*.parquet"))
    return {path.name: path.read_bytes() for path in files}


def disturbed(
    folder: Path,
    number: int,
    k: int,
    kinds: Sequence[str],
    cluster: Nodes,
    rng: random.Random,
    embedded: bool,
) -> list[Fault]:
    """One run with these faults; an ending one goes last of those before the next start."""
    run_dir = folder / f"run-{number}"
    for leftover in (run_dir, run_dir.with_suffix(".traps")):
        shutil.rmtree(leftover, ignore_errors=True)
    reference = result(undisturbed(folder, k, cluster, embedded))
    seconds: list[float] = []
    process = start(run_dir, k, cluster, embedded, *born_with(kinds[0], rng))
    code: int | None = None
    try:
        for place, kind in enumerate(kinds):
            # A line comes before its checkpoint: at first one more, so that one is there to damage.
            _wait_for_lines(run_dir, process, 1 if place else 2)
            time.sleep(rng.random() * 0.5)
            began = time.monotonic()
            inject(kind, run_dir, process, cluster, rng)
            if kind in ENDING:
                code = process.wait(DEADLINE_S)
                expected = 130 if kind == DRIVER_TERMINATED else None
                assert code != 0, f"{kind}: the run ended as if nothing had happened"
                assert expected in (None, code), f"{kind}: exit code {code}"
                if kind == DAMAGED:
                    damage(run_dir, rng)
                following = kinds[place + 1] if place + 1 < len(kinds) else ""
                more = "--resume", *born_with(following, rng)
                process = start(run_dir, k, cluster, embedded, *more)
            _wait_for_lines(run_dir, process, 2)
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


def lines(run_dir: Path) -> int:
    """Iterations that a run has recorded so far."""
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _wait_for_lines(run_dir: Path, process: subprocess.Popen[str], more: int) -> None:
    """Until so many more iterations are done, or the process has ended."""
    before, deadline = lines(run_dir), time.monotonic() + DEADLINE_S
    while lines(run_dir) < before + more and process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no iteration within {DEADLINE_S:.0f} s")
        time.sleep(0.02)


def scenarios(faults: int, seed: int, kinds: Sequence[str] = KINDS) -> list[tuple[int, list[str]]]:
    """Runs of several faults, every kind equally often: k and the kinds of each.

    A run never has a write's fault right after one that leaves the driver alive: only a driver that
    is restarted can be given one.
    """
    rng = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < faults:
        drawn += rng.sample(kinds, len(kinds))
    runs = []
    for i in range(0, faults, PER_RUN):
        chosen = drawn[i : min(i + PER_RUN, faults)]
        # Endings first: each is then followed by a fresh start.
        ordered = [c for c in chosen if c in ENDING] + [c for c in chosen if c not in ENDING]
        runs.append((i // PER_RUN % 2, ordered))
    return runs


def table(faults: Sequence[Fault]) -> list[str]:
    lines = [
        "| fault | times | recovered | bits equal | median s | worst s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    groups = [(kind, [f for f in faults if f.kind == kind]) for kind in KINDS]
    for name, of in [*groups, ("all", list(faults))]:
        if of:
            took = [fault.seconds for fault in of]
            lines.append(
                f"| {name} | {len(of)} | {sum(f.recovered for f in of)} | "
                f"{sum(f.equal for f in of)} | {median(took):.1f} | {max(took):.1f} |"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=12)
    parser.add_argument("--short", action="store_true", help="two fixed runs of five faults")
    parser.add_argument("--embedded", action="store_true", help="real actors, embedded pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "chaos")
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "token"
    folder = options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "faults.jsonl"
    known = record.read_text().splitlines() if record.exists() else []
    done = [Fault(**json.loads(line)) for line in known]
    finished = {fault.run for fault in done}
    kinds = EMBEDDED_KINDS if options.embedded else KINDS
    planned = SHORT if options.short else scenarios(options.faults, options.seed, kinds)
    memory = any("memory" in kind for _, kinds in planned for kind in kinds)
    with nodes(memory_faults=memory) as cluster:
        for number, (k, chosen) in enumerate(planned):
            if number in finished:
                continue
            rng = random.Random(options.seed * 100_003 + number)
            found = disturbed(folder, number, k, chosen, cluster, rng, options.embedded)
            done += found
            with record.open("a") as file:
                file.writelines(json.dumps(asdict(fault)) + "\n" for fault in found)
            for fault in found:
                print(f"{number}: {fault}", flush=True)
    print("\n".join(table(done)))
    return 0 if all(fault.equal for fault in done) else 1


if __name__ == "__main__":
    sys.exit(main())
