"""The tables of benchmarks/transfer.py, from its kept results alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from texforce_ray.files import atomic_write_text

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results" / "transfer"
PAGE = ROOT / "docs" / "results" / "transfer.md"
DISCUSSION = KEPT / "discussion.md"
NAMES = {
    "flow-text": "three text encoders, PPO",
    "flow-transformer": "transformer, PPO",
    "flow-text-nft": "three text encoders, NFT",
    "flow-transformer-nft": "transformer, NFT",
    "flow-shared": "flow pipeline, shared encoder alone",
    "ddim-shared": "DDIM pipeline, shared encoder",
}
_WORDS = tuple(name for name in NAMES if not name.endswith("-shared"))
_ENOUGH = 0.05  # of a gain, for a share of it to mean anything


def write_page() -> None:
    """Write docs/results/transfer.md."""
    runs = {name: _runs(name) for name in NAMES}
    discussion = DISCUSSION.read_text() if DISCUSSION.exists() else ""
    atomic_write_text(PAGE, "\n".join([*_words(runs), "", *_models(runs), "", discussion]) + "\n")
    print(PAGE.read_text())


def _runs(name: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(KEPT.glob(f"{name}-[0-9]*.json"))]


def gained(points: Sequence[dict[str, float]], kinds: Sequence[str]) -> list[tuple[float, float]]:
    """(gain on the trained phrases, mean gain on other wordings) at each measured iteration."""
    first = points[0]
    return [
        (p["trained"] - first["trained"], mean(p[kind] - first[kind] for kind in kinds))
        for p in points
    ]


def kept_at(curve: Sequence[tuple[float, float]], gain: float) -> float | None:
    """The gain on other wordings when that on the trained phrases first was `gain`."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= gain <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (gain - x0) / (x1 - x0)
    return None


def kinds_of(run: dict[str, Any]) -> list[str]:
    return [key for key in run["points"][0] if key not in ("iteration", "trained")]


def _words(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    found = {name: runs[name] for name in _WORDS if runs[name]}
    lines = [
        "# What an adapter is worth elsewhere", "",
        "## Other words", "",
        "Gains over the base model by `shapes` on the flow pipeline, drawn as stock pipelines draw "
        "(guidance 3, no noise): on the four trained phrases, and on phrases that say the same in "
        "other words and were never trained on. Mean and range of the seeds.", "",
    ]  # fmt: skip
    if not found:
        return lines
    kinds = kinds_of(next(iter(found.values()))[0])
    lines += [
        f"| adapter of | seeds | trained | {' | '.join(kinds)} | all other words | share kept |",
        f"| --- |{' ---: |' * (len(kinds) + 4)}",
    ]
    for name, each in found.items():
        last = [run["points"][-1] for run in each]
        first = [run["points"][0] for run in each]
        columns = [
            [b[kind] - a[kind] for a, b in zip(first, last, strict=True)]
            for kind in ("trained", *kinds)
        ]
        words = [gained(run["points"], kinds)[-1] for run in each]
        cells = [_cell(column) for column in columns] + [_cell([y for _, y in words])]
        here, there = mean(x for x, _ in words), mean(y for _, y in words)
        share = f"{there / here:.0%}" if here > _ENOUGH else "-"
        lines.append(f"| {NAMES[name]} | {len(each)} | {' | '.join(cells)} | {share} |")
    return [*lines, "", *_matched(found, kinds)]


def _matched(found: dict[str, list[dict[str, Any]]], kinds: Sequence[str]) -> list[str]:
    """The comparison at the same reward on the trained phrases."""
    curves = {n: [gained(run["points"], kinds) for run in each] for n, each in found.items()}
    lines = [
        "At the same gain on the trained phrases:",
        "",
        f"| gain there | {' | '.join(NAMES[name] for name in curves)} |",
        f"| ---: |{' ---: |' * len(curves)}",
    ]
    for gain in (0.05, 0.10, 0.15, 0.20, 0.25, 0.30):
        cells = []
        for each in curves.values():
            values = [v for curve in each if (v := kept_at(curve, gain)) is not None]
            cells.append(f"{_cell(values)} ({len(values)})" if values else "-")
        lines.append(f"| {gain:.2f} | {' | '.join(cells)} |")
    return lines


def _models(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "## Another model with the same encoder", "",
        "The flow pipeline's first text encoder is the DDIM pipeline's, frozen during its own "
        "pre-training. An adapter of that encoder alone, on its model and on the other one:", "",
        "| trained on | seeds | gain there | gain on the other model | its base |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for name in ("ddim-shared", "flow-shared"):
        if not (each := runs[name]):
            continue
        own = [_gain(run["points"][0], run["points"][-1]) for run in each]
        other = [_gain(run["elsewhere"]["base"], run["elsewhere"]["tuned"]) for run in each]
        base = mean(run["elsewhere"]["base"]["trained"] for run in each)
        lines.append(
            f"| {NAMES[name]} | {len(each)} | {_cell(own)} | {_cell(other)} | {base:.3f} |"
        )
    return lines


def _gain(before: dict[str, float], after: dict[str, float]) -> float:
    return after["trained"] - before["trained"]


def _cell(values: Sequence[float]) -> str:
    spread = f" [{min(values):+.3f}, {max(values):+.3f}]" if len(values) > 1 else ""
    return f"{mean(values):+.3f}{spread}"
