"""What the measurements share: an actor's environment, clocks, results as JSON and Markdown."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from texforce_ray.actors.process import ALLOCATOR

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def as_in_an_actor() -> None:
    """Start this process again with the memory allocator's settings that actors have."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)


class Clock:
    """Seconds from one stop to the next, and each phase's peak of GPU memory."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self._restart()

    def stop(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes[name] = torch.cuda.max_memory_allocated(self.device)
        self.seconds[name] = time.perf_counter() - self._last
        self._restart()

    def _restart(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._last = time.perf_counter()


def medians(rounds: int, ways: dict[str, Callable[[], dict[str, float]]]) -> dict[str, dict]:
    """Median seconds of each phase of each way. They take turns; the first turn is for caches."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in ways.items():
            seconds = run()
            if turn:
                seen[name].append(seconds)
    return {
        name: {phase: median(s[phase] for s in seconds) for phase in seconds[0]}
        for name, seconds in seen.items()
    }


def write(name: str, result: dict, table: list[str]) -> None:
    """results/NAME.json and NAME.md, and both printed."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    print(json.dumps(result))
