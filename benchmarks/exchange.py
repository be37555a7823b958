"""What does it cost L learners to add up their gradients?

    python benchmarks/exchange.py [--most 64] [--megabytes 5] [--rounds 8]

The real group of learners (`texforce_ray.rl.group`) with real messages, over this machine's
loopback: L = 1, 2, 4, ... processes, each with a gradient of its own, add them up along the tree.
For comparison, up to 16 learners also fetch what every other one has; for 64, memory would have to
hold 64 times 64 gradients. All learners share this machine's cores, so the wall time is that of all
messages together; CPU seconds and bytes of one learner are what carries over to machines of their
own. All must hold the same bits in the end, either way.

Writes benchmarks/results/exchange.json and exchange.md.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from common import write
from scaling import doubling

from texforce_ray.rl.group import LearnerGroup, SoloGroup
from texforce_ray.rl.tree_sum import tree_sum

GATHER = 16  # learners at most that gather everything
WARM = 2  # rounds that are not counted: connections are made in the first


def gradient(rank: int, size: int) -> torch.Tensor:
    """A shard's row, [1, size]: sums of such rows depend on the order of additions."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(1, size, generator=generator) * 10.0 ** torch.randint(-3, 4, (1, size))


def learner(rank: int, count: int, address: str, size: int, rounds: int, out: Connection) -> None:
    """One learner: times of its exchanges, in seconds, and what it received."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    group = (
        SoloGroup()
        if count == 1
        else LearnerGroup(address, rank, count, torch.device("cpu"), timeout_s=600)
    )
    own = gradient(rank, size)
    result: dict[str, Any] = {}
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"tree": group.sum}
    if count <= GATHER:
        ways["gather"] = lambda own: tree_sum(group.gather(own))
    for name, exchange in ways.items():
        for _ in range(WARM):
            total = exchange(own)
        group.gather(torch.zeros(1, 1))  # all start together
        received, cpu, began = group.received_bytes, time.process_time(), time.perf_counter()
        for _ in range(rounds):
            total = exchange(own)
        result[name] = {
            "seconds": (time.perf_counter() - began) / rounds,
            "cpu_seconds": (time.process_time() - cpu) / rounds,
            "received_bytes": (group.received_bytes - received) // rounds,
            "sum": hashlib.sha256(total.numpy().tobytes()).hexdigest(),
        }
    out.send(result)
    group.close()


def measure(count: int, size: int, rounds: int) -> dict[str, Any]:
    """One row: the slowest learner's time, the mean CPU time, the bytes into each."""
    context = multiprocessing.get_context("fork")  # torch is imported once
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(count):
        mine, theirs = context.Pipe(duplex=False)
        given = (rank, count, f"tcp://127.0.0.1:{port}", size, rounds, theirs)
        processes.append(context.Process(target=learner, args=given))
        pipes.append(mine)
        processes[-1].start()
        theirs.close()
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    row: dict[str, Any] = {"learners": count}
    for name in results[0]:
        each = [result[name] for result in results]
        if len({one["sum"] for one in each} | {results[0]["tree"]["sum"]}) > 1:
            raise SystemExit(f"{count} learners do not agree on the sum ({name})")
        row[name] = {
            "seconds": max(one["seconds"] for one in each),
            "cpu_seconds": float(np.mean([one["cpu_seconds"] for one in each])),
            "received_bytes": each[0]["received_bytes"],
        }
    return row


def summary(rows: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """All rows; the CPU time of a learner in a round of the tree, fitted to them."""
    many = [row for row in rows if row["learners"] > 1]
    result: dict[str, Any] = {"bytes": 4 * size, "cores": os.cpu_count(), "runs": rows}
    if len(many) > 1:
        depth = [np.log2(row["learners"]) for row in many]
        slope, _ = np.polyfit(depth, [row["tree"]["cpu_seconds"] for row in many], 1)
        result["cpu_ms_of_a_round"] = 1e3 * float(slope)
    return result


def table(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Gradients of {result['bytes'] / 1e6:g} MB, all learners on {result['cores']} cores.",
        "",
        "| learners | into each (MB) | exchange (ms) | CPU of each (ms) | gather: into each (MB) "
        "| exchange (ms) | CPU of each (ms) | tree / gather |",
        "| " + " | ".join(["---"] * 8) + " |",
    ]
    for row in result["runs"]:
        tree, gather = row["tree"], row.get("gather")
        cells = [row["learners"], *_cells(tree), *(_cells(gather) if gather else ("", "", ""))]
        many = gather and row["learners"] > 1
        cells.append(f"{tree['seconds'] / gather['seconds']:.2f}" if many else "")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if "cpu_ms_of_a_round" in result:
        lines += ["", f"A round of the tree takes a learner {result['cpu_ms_of_a_round']:.1f} ms."]
    return lines


def _cells(way: dict[str, Any]) -> tuple[str, str, str]:
    return (
        f"{way['received_bytes'] / 1e6:.1f}",
        f"{1e3 * way['seconds']:.1f}",
        f"{1e3 * way['cpu_seconds']:.1f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=64, help="learners: 1, 2, 4, ... up to this")
    parser.add_argument("--megabytes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    size = int(options.megabytes * 1e6 / 4)
    rows = [measure(count, size, options.rounds) for count in doubling(options.most)]
    result = summary(rows, size)
    write("exchange", result, table(result))


if __name__ == "__main__":
    main()
