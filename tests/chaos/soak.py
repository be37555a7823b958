"""Does memory grow? Hundreds of small iterations; the slope of every process's memory.

    python tests/chaos/soak.py [--iterations 300]

Prints MB per 100 iterations of the driver and of each actor, threads and open files at the start
and at the end, and what of it outlives the run. Ends with 1 if a slope exceeds 1 MB
per 100 iterations or something is left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.chaos.drill import lines

JOB = Path(__file__).parent / "job.py"
LIMIT = 1.0  # MB per 100 iterations
WARM_UP = 0.3  # share of the run that is not counted: caches fill
MB = 2**20


def watch(iterations: int, run_dir: Path) -> tuple[dict[str, list[tuple[int, ...]]], list[str]]:
    """(iteration, private bytes, threads, files) by process; what outlived the run."""
    command = [sys.executable, str(JOB), str(run_dir), "--k", "1", "--iterations", str(iterations)]
    trace = run_dir.with_suffix(".trace")
    command += ["--trace", str(trace)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    driver, seen = psutil.Process(process.pid), defaultdict(list)
    family: set[psutil.Process] = set()
    while process.poll() is None:
        time.sleep(0.5)
        done = lines(run_dir)
        try:
            children = driver.children(recursive=True)
        except psutil.NoSuchProcess:
            break
        family |= set(children)
        for one in [driver, *children]:
            title = _title(one, driver)
            if title is None or not done:
                continue
            try:
                memory = one.memory_full_info().uss
                seen[title].append((done, memory, one.num_threads(), one.num_fds()))
            except psutil.Error:
                continue
    assert process.returncode == 0, f"the run ended with {process.returncode}"
    notes = [json.loads(line) for line in trace.read_text().splitlines()]
    updates = [note for note in notes if note["what"] == "update"]
    seen["object store"] = [(note["version"], int(note["store_bytes"]), 0, 0) for note in updates]
    _, alive = psutil.wait_procs(family, timeout=15)
    return seen, [" ".join(p.cmdline())[:80] for p in alive if p.is_running()]


def _title(process: psutil.Process, driver: psutil.Process) -> str | None:
    if process == driver:
        return "driver"
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return None
    if title.startswith("ray::") and not title.startswith("ray::IDLE"):
        return f"{title.split('.')[0].split()[0]} {process.pid}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen, left = watch(options.iterations, Path(folder) / "run")
    print("| process | MB per 100 iterations | MB | threads | open files |")
    print("| --- | --- | --- | --- | --- |")
    bad = bool(left)
    for title, rows in sorted(seen.items()):
        # Not the run's end: a process that ends gives its memory back.
        most = options.iterations
        warm = [row for row in rows[:-2] if WARM_UP * most <= row[0] < most]
        counted = np.array(warm, float)
        if len(counted) < 10:
            continue
        slope = 100 * np.polyfit(counted[:, 0], counted[:, 1] / MB, 1)[0]
        bad |= slope > LIMIT
        first, last = counted[0], counted[-1]
        print(
            f"| {title.rpartition(' ')[0] or title} | {slope:+.2f} | {last[1] / MB:.0f} "
            f"| {first[2]:.0f} to {last[2]:.0f} | {first[3]:.0f} to {last[3]:.0f} |"
        )
    print(f"left after the run: {', '.join(left) or 'nothing'}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
