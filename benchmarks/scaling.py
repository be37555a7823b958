"""How much of R rollout actors' time does the system use, and what does it cost the driver?

    python benchmarks/scaling.py [--most 64] [--nodes 1 2 4] [--add] [--unit-seconds 2]

The real driver, pools and object store, with actors that sleep for the GPU's time and pass arrays
of Stable Diffusion 1.5's sizes (texforce_ray.testing.stand_ins): R = 1, 2, 4, ... actors on one
node (k = 1), some of them again with k = 0, where every actor waits for the next version and
publishing can be timed, and the same number of actors over 1, 2 and 4 nodes of a cluster (all on
this machine). Every actor has as many units in an iteration whatever R is, so iterations should
take equally long.

Writes benchmarks/results/scaling.json and scaling.md; with --add, rows that are not measured again
stay. Figures are of the steady state: from the end of the second update to that of the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.driver.training import train
from texforce_ray.testing import stand_ins

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
UNITS = 4  # of each actor in an iteration
UNIT_S, UPDATE_S = 2.0, 2.0
SNAPSHOT_BYTES = 5_000_000


class Watch:
    """Samples CPU seconds of this process and of the machine, to be read at any moment later."""

    def __init__(self, interval: float = 0.05) -> None:
        self._interval, self._rows = interval, [_clocks()]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._rows.append(_clocks())

    def between(self, start: float, end: float) -> tuple[float, float, float]:
        """CPU seconds of this process and of its main thread; busy share of the machine's cores."""
        times, *clocks = np.array(self._rows).T
        values = [float(np.diff(np.interp([start, end], times, c))[0]) for c in clocks]
        process, thread, busy, total = values
        return process, thread, busy / total

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self._rows.append(_clocks())


def _clocks() -> tuple[float, ...]:
    fields = [float(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    main = Path(f"/proc/self/task/{os.getpid()}/schedstat").read_text().split()[0]
    busy = sum(fields) - fields[3] - fields[4]
    return time.time(), time.process_time(), int(main) / 1e9, busy, sum(fields)


def configured(folder: Path, rollouts: int, staleness: int, iterations: int, batch: int) -> Config:
    """Actors ask for no CPU, so that any number fits; resources say on which nodes they are."""
    return make_config(
        {
            "run_dir": str(folder / "run"),
            "iterations": iterations,
            "max_staleness": staleness,
            "diffusion": {"steps": 50, "storage_dtype": "float16"},
            "prompts": {
                "train": {"set": "shapes-phrases"},
                "per_iteration": UNITS * rollouts,
                "samples_per_prompt": batch,
            },
            "rollout": {
                "num_workers": rollouts,
                "batch_size": batch,
                "num_threads": 1,
                "num_cpus": 0,
                "resources": {"rollout": 1},
            },
            "rewards": [
                {
                    "target": stand_ins.REWARD,
                    "replicas": max(1, rollouts // 16),
                    "num_cpus": 0,
                    "resources": {"head": 1},
                }
            ],
            "advantage": {"mode": "batch"},
            "learner": {"num_threads": 1, "num_cpus": 0, "resources": {"head": 1}},
            "eval": {"every": 0, "final_images": 0},
            "ray": {"start_timeout_s": 900},
        }
    )


def measure(
    rollouts: int,
    *,
    staleness: int,
    iterations: int,
    unit_seconds: float = UNIT_S,
    update_seconds: float = UPDATE_S,
    batch: int = 1,
) -> dict[str, Any]:
    """One run on the cluster that is connected to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = stand_ins.Settings(
            sample_seconds=unit_seconds,
            update_seconds=update_seconds,
            ballast_bytes=SNAPSHOT_BYTES,
            trace=str(folder / "trace"),
        )
        config = configured(folder, rollouts, staleness, iterations, batch)
        with Watch() as watch:
            train(config, roles=stand_ins.roles(settings))
        notes = stand_ins.read_trace(folder / "trace")
    updates = [note for note in notes if note["what"] == "update"]
    loads = [note for note in notes if note["what"] == "load" and 0 < note["version"] < iterations]
    start, end = updates[1]["time"], updates[-1]["time"]
    done = iterations - 2
    period = (end - start) / done
    cpu, thread, busy = watch.between(start, end)
    units = UNITS * rollouts
    # Of sleeping alone: k = 1 samples while the learner works, k = 0 before.
    sampling = UNITS * unit_seconds
    ideal = max(sampling, update_seconds) if staleness else sampling + update_seconds
    row = {
        "staleness": staleness,
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "rollouts": rollouts,
        "units": units,
        "iteration_seconds": period,
        "samples_per_second": units * batch / period,
        "of_sleeping": ideal / period,
        "driver_ms_per_iteration": 1e3 * cpu / done,
        "main_thread_ms_per_iteration": 1e3 * thread / done,
        "machine_busy": busy,
        "store_bytes": max(note["store_bytes"] for note in updates),
        "fetch_ms_worst": 1e3 * max(note["seconds"] for note in loads),
    }
    if staleness == 0:
        # All actors wait for it, so the last one's arrival is that of the version.
        ends = {note["version"]: note["time"] for note in updates}
        arrived: dict[int, list[float]] = {}
        for note in loads:
            arrived.setdefault(note["version"], []).append(note["time"] - ends[note["version"]])
        assert all(len(times) == rollouts for times in arrived.values())
        row["publish_ms_first"] = 1e3 * float(np.median([min(t) for t in arrived.values()]))
        row["publish_ms_last"] = 1e3 * float(np.median([max(t) for t in arrived.values()]))
        row["publish_share"] = row["publish_ms_last"] / 1e3 / period
    return row


@contextlib.contextmanager
def cluster(nodes: int, rollouts: int) -> Iterator[None]:
    """`nodes` nodes on this machine with room for `rollouts` actors each; learner on the first."""
    room = {"num_cpus": 2, "resources": {"rollout": rollouts}}
    head = room | {"resources": {"rollout": rollouts, "head": 100}}
    # Half of /dev/shm at most; a node's store must hold what its actors have made.
    head |= {"object_store_memory": 6 * GIB, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes - 1):
            started.add_node(**room, object_store_memory=GIB)
        ray.init(
            address=started.address,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
        yield
    finally:
        ray.shutdown()
        started.shutdown()


def summary(rows: list[dict[str, Any]], unit_seconds: float = UNIT_S) -> dict[str, Any]:
    """All rows, with the efficiency against one actor, and the driver's cost of a unit."""
    rows = sorted(rows, key=lambda r: (-r["staleness"], r["nodes"], r["rollouts"]))
    ones = {r["staleness"]: r["samples_per_second"] for r in rows if r["rollouts"] == 1}
    for row in rows:
        one = ones.get(row["staleness"])
        row["efficiency"] = row["samples_per_second"] / (row["rollouts"] * one) if one else None
    result: dict[str, Any] = {"unit_seconds": unit_seconds, "update_seconds": UPDATE_S}
    result["runs"] = rows
    many = [r for r in rows if r["staleness"] == 1 and r["nodes"] == 1]
    if len(many) > 1:  # an iteration's fixed cost and that of each unit
        for name in ("driver", "main_thread"):
            cost = [r[f"{name}_ms_per_iteration"] for r in many]
            slope, fixed = np.polyfit([r["units"] for r in many], cost, 1)
            result |= {f"{name}_ms_of_a_unit": slope, f"{name}_ms_of_an_iteration": fixed}
    return result


def table(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Units of {result['unit_seconds']:g} s, {UNITS} for each actor in an iteration; updates "
        f"of {result['update_seconds']:g} s; snapshots of {SNAPSHOT_BYTES / 1e6:g} MB.",
        "",
        "| k | nodes | R | samples/s | efficiency | of sleeping | driver ms/unit "
        "(main thread) | all R have the new version after (ms) | slowest fetch (ms) "
        "| object store (MB) | machine busy |",
        "| " + " | ".join(["---"] * 11) + " |",
    ]
    for r in result["runs"]:
        staleness = r["staleness"]
        efficiency = "" if r["efficiency"] is None else f"{r['efficiency']:.3f}"
        publish = f"{r['publish_ms_last']:.0f} ({r['publish_share']:.1%})" if staleness == 0 else ""
        lines.append(
            f"| {staleness} | {r['nodes']} | {r['rollouts']} | {r['samples_per_second']:.2f} "
            f"| {efficiency} | {r['of_sleeping']:.3f} "
            f"| {r['driver_ms_per_iteration'] / r['units']:.1f} "
            f"({r['main_thread_ms_per_iteration'] / r['units']:.1f}) | {publish} "
            f"| {r['fetch_ms_worst']:.0f} | {r['store_bytes'] / 1e6:.0f} "
            f"| {r['machine_busy']:.0%} |"
        )
    if "driver_ms_of_a_unit" in result:
        lines += [
            "",
            "CPU time of the driver, fitted to the rows with k = 1 on one node: "
            f"{result['driver_ms_of_a_unit']:.2f} ms for each unit and "
            f"{result['driver_ms_of_an_iteration']:.0f} ms for each iteration; of its main thread, "
            f"on which everything depends, {result['main_thread_ms_of_a_unit']:.2f} ms and "
            f"{result['main_thread_ms_of_an_iteration']:.0f} ms.",
        ]
    return lines


def doubling(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=64, help="actors: 1, 2, 4, ... up to this")
    parser.add_argument("--rollouts", type=int, nargs="*", help="these instead, with k = 1")
    parser.add_argument("--publish", type=int, nargs="*", help="with k = 0; default: 1, 16, most")
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--spread", type=int, default=16, help="actors over those nodes")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--unit-seconds", type=float, default=UNIT_S, help="of sleeping")
    parser.add_argument("--add", action="store_true", help="to the results that are there")
    options = parser.parse_args()
    path = RESULTS / "scaling.json"
    known = []
    if options.add and path.exists():
        before = json.loads(path.read_text())
        if before["unit_seconds"] != options.unit_seconds:
            parser.error(f"--add: {path} has units of {before['unit_seconds']:g} s")
        known = before["runs"]
    rows = {(r["staleness"], r["nodes"], r["rollouts"]): r for r in known}

    def run(counts: Sequence[int], staleness: int) -> None:
        for rollouts in counts:
            row = measure(
                rollouts,
                staleness=staleness,
                iterations=options.iterations,
                unit_seconds=options.unit_seconds,
            )
            rows[staleness, row["nodes"], rollouts] = row
            result = summary(list(rows.values()), options.unit_seconds)
            RESULTS.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=2) + "\n")
            (RESULTS / "scaling.md").write_text("\n".join(table(result)) + "\n")

    pipelined = doubling(options.most) if options.rollouts is None else options.rollouts
    publish = options.publish
    if publish is None:
        publish = sorted({1, min(16, options.most), options.most})
    if pipelined or publish:
        with cluster(1, max([*pipelined, *publish])):
            run(pipelined, 1)
            run(publish, 0)
    for nodes in options.nodes:
        if nodes > 1 or options.spread not in pipelined:
            with cluster(nodes, -(-options.spread // nodes)):
                run([options.spread], 1)
    result = summary(list(rows.values()), options.unit_seconds)
    print("\n".join(table(result)))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
