"""What moved from one `make bench` to another, beyond noise.

    python benchmarks/compare.py BEFORE AFTER [--noise 0.05] [--all]

BEFORE and AFTER are each a bench.json, or a folder with several of the same commit and machine. A
figure's range among them is its noise; it has moved if the two ranges are further apart than the
share --noise of its value. Exits with 1 if a count, which needs no quiet machine, moved at all:
what a result calls bytes, flops, flops_per_sample, calls or compilations.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of a row in a list: what it is a row of.
_LABELS = (
    "name", "size", "batch", "staleness", "nodes", "rollouts", "s", "l", "what", "dtype", "family",
    "learners",
)  # fmt: skip
# Counted, not measured: they need no quiet machine. A peak of memory is not among them.
_COUNTS = ("bytes", "calls", "compilations", "flops", "flops_per_sample")


@dataclass(frozen=True)
class Moved:
    """One figure: its name, its mean before and after, and the gap between both ranges."""

    name: str
    before: float
    after: float
    gap: float  # of the larger mean; 0 where the ranges overlap

    @property
    def exact(self) -> bool:
        """Whether it is counted, not timed."""
        return self.name.rpartition(".")[2] in _COUNTS


def figures(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a result, by a name that does not depend on the order of rows."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from figures(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from figures(inner, f"{name}[{_label(inner, index)}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def _label(row: Any, index: int) -> str:
    if isinstance(row, list) and row and isinstance(row[0], str):
        return row[0]  # [operation, share]
    if not isinstance(row, dict):
        return str(index)
    found = [f"{key}={row[key]}" for key in _LABELS if isinstance(row.get(key), str | int)]
    return ", ".join(found) or str(index)


def compare(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> tuple[list[Moved], list[str]]:
    """The figures of both sides, by falling gap; and the names that only one side has."""
    sides = []
    for results in (before, after):
        found: dict[str, list[float]] = {}
        for result in results:
            for name, value in figures(result):
                found.setdefault(name, []).append(value)
        sides.append(found)
    old, new = sides
    rows = [_moved(name, old[name], new[name]) for name in old.keys() & new.keys()]
    return sorted(rows, key=lambda row: (-row.gap, row.name)), sorted(old.keys() ^ new.keys())


def _moved(name: str, old: list[float], new: list[float]) -> Moved:
    means = sum(old) / len(old), sum(new) / len(new)
    apart = max(0.0, min(new) - max(old), min(old) - max(new))
    return Moved(name, *means, apart / (max(map(abs, means)) or 1.0))


def read(path: Path) -> list[dict[str, Any]]:
    """One result, or all of a folder.

    Raises:
        SystemExit: there is none, or one is not a result.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    try:
        results = [json.loads(file.read_text()) for file in files]
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")
    if not results or not all(isinstance(result, dict) for result in results):
        sys.exit(f"{path}: no result of `make bench` (a bench.json, or a folder of them)")
    return results


def _origin(result: dict[str, Any]) -> str:
    return f"commit {result.get('commit', 'unknown')}, {result.get('machine', 'unknown machine')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--noise", type=float, default=0.05, help="share of a value (0.05)")
    parser.add_argument("--all", action="store_true", help="also what did not move")
    options = parser.parse_args()
    before, after = read(options.before), read(options.after)
    for side, results in (("before", before), ("after", after)):
        for origin in dict.fromkeys(map(_origin, results)):
            print(f"{side}: {origin}")
    machines = {str(result.get("machine")) for result in (*before, *after)}
    if len(machines) > 1:
        print("different machines: only shares, ratios and counts can be compared")
    rows, alone = compare(before, after)
    counted = [row for row in rows if row.exact and row.gap > 0]
    moved = [row for row in rows if row in counted or row.gap > options.noise]
    print(f"{len(moved)} of {len(rows)} figures moved by more than {options.noise:.0%}, or at all")
    for row in rows if options.all else moved:
        ratio = f"x {row.after / row.before:.3f}" if row.before else "from 0"
        print(f"  {row.name}: {row.before:.6g} -> {row.after:.6g} ({ratio})")
    if alone:
        print(f"{len(alone)} figures are on one side only: {', '.join(alone[:5])} ...")
    return 1 if counted else 0


if __name__ == "__main__":
    sys.exit(main())
