"""The page of the comparison of objectives, from the kept results: tables and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import objectives_plan as plan
from texforce_ray.files import atomic_write_text
from texforce_ray.records.charts import Series, standalone_paths
from texforce_ray.records.intervals import crossed_interval

PAGE = plan.RESULTS.with_suffix(".md")
TITLES = {
    "text": "On the text encoder",
    "unet": "On the U-Net",
    "both": "On both",
}
_GAIN = 0.15
_DRAWN = (*plan.MAIN, "ppo, kl_mask", "ppo, guard")  # a figure has eight colours

_INTRODUCTION = """\
# Which objective to pick

{discussion}

## How it was measured

Made by `make bench-objectives` (`python benchmarks/objectives.py`) from the files in `objectives/`
beside this page. The embedded pipeline, `configs/shapes.yaml`: four phrases, {samples} samples an
iteration without guidance, {iterations} iterations of four optimizer updates. PPO and ReFL sample
with eta 1, the others with eta 0; PPO trains five timesteps of each sample, the others five noise
levels. All are trained on `shapes` (ReFL on its differentiable stand-in) and evaluated on {images}
images at guidance 5, where the base model is best; `appearance` is never trained on.

Settings were searched first, with seed {search_seed} and {searched} iterations: learning rates
{rates}, and one more beyond if the best was at an edge, each with two values of one other setting.
Then seeds {seeds} were trained with the best. PPO's variants were searched to the end on the text
encoder alone; guard and kl_mask have a KL penalty of 0.2 throughout. Intervals are 95 % bootstraps
over training seeds and prompts. "Best on the way" and the samples to a gain are read off the mean
curve over seeds, which has a point every second iteration, from {curve_images} images.

The kept runs shared one H200 GPU, sixteen at once. Seconds are from two CPU cores, one objective
after the other.
"""


def write_page() -> None:
    """Write the page and its figures."""
    base = json.loads((plan.RESULTS / "base.json").read_text())
    blocks = [
        _INTRODUCTION.format(
            discussion=_discussion(),
            samples=_samples(),
            iterations=plan.ITERATIONS,
            images=plan.IMAGES,
            curve_images=plan.CURVE_IMAGES,
            search_seed=plan.SEARCH_SEED,
            searched=plan.SEARCHED,
            rates=", ".join(f"{rate:g}" for rate in plan.RATES),
            seeds=", ".join(map(str, plan.SEEDS)),
        )
    ]
    for part, title in TITLES.items():
        rows = [(row, _results(row)) for row in plan.rows() if row[1] == part]
        rows = [(row, found) for row, found in rows if found]
        if rows:
            blocks += [f"## {title}\n", *_table(rows, base), *_figures(part, rows, base)]
    if costs := list(_costs()):
        blocks += ["## Costs\n", *costs]
    blocks += ["## The search\n", *_search()]
    atomic_write_text(PAGE, "\n".join(blocks).rstrip() + "\n")


def _samples() -> int:
    return plan.config_of(next(plan.searched())).samples_per_iteration


def _discussion() -> str:
    file = plan.RESULTS / "discussion.md"
    return file.read_text().strip() if file.is_file() else ""


def _results(row: tuple[str, str, float, float]) -> list[dict[str, Any]]:
    runs = (plan.Run(*row, seed, plan.ITERATIONS) for seed in plan.SEEDS)
    return [found for run in runs if (found := plan.result(run)) is not None]


def _label(row: tuple[str, str, float, float]) -> str:
    name, _, rate, setting = row
    key = plan.OBJECTIVES[name].key.rpartition(".")[2]
    return f"{name}: lr {rate:g}, {key} {setting:g}"


def _table(rows: Sequence[tuple[tuple, list[dict]]], base: dict[str, Any]) -> Iterator[str]:
    columns = (
        "objective", "seen phrases", "by seed", "best on the way", f"samples to +{_GAIN:g}",
        "unseen partners", "appearance", "diversity", "drift",
    )  # fmt: skip
    yield f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}"
    seen, unseen = base["seen"], base["unseen"]
    yield (
        f"| base | {seen['reward']:.3f} | | | | {unseen['reward']:.3f} | "
        f"{seen['appearance']:.3f} | {seen['diversity']:.3f} | 0 |"
    )
    for row, found in sorted(rows, key=lambda pair: -_mean(pair[1], "seen", "reward")):
        seeds = ", ".join(f"{run['seen']['reward']:.3f}" for run in found)
        reached = _samples_to(found, seen["reward"] + _GAIN)
        cells = (
            _label(row), _difference(found, base, "seen"), seeds,
            f"{_curve(found)[1].max():.3f}", "" if reached is None else f"{reached:,.0f}",
            _difference(found, base, "unseen"), f"{_mean(found, 'seen', 'appearance'):.3f}",
            f"{_mean(found, 'seen', 'diversity'):.3f}", f"{_mean(found, 'seen', 'drift'):.3f}",
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    yield ""


def _mean(found: Sequence[dict], prompts: str, key: str) -> float:
    return float(np.mean([run[prompts][key] for run in found]))


def _difference(found: Sequence[dict], base: dict[str, Any], prompts: str) -> str:
    before = np.array(base[prompts]["scores"])
    scores = np.array([run[prompts]["scores"] for run in found]) - before
    low, high = crossed_interval(scores, base[prompts]["prompts"])
    reward = _mean(found, prompts, "reward")
    return f"{reward:.3f}: {scores.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def _curve(found: Sequence[dict], key: str = "samples") -> tuple[np.ndarray, np.ndarray]:
    """Costs so far and evaluated rewards, means over seeds."""
    points = [[p for p in run["curve"] if "eval/shapes" in p] for run in found]
    length = min(map(len, points))
    columns = ([[p[name] for p in run[:length]] for run in points] for name in (key, "eval/shapes"))
    xs, ys = (np.mean(column, axis=0) for column in columns)
    return xs, ys


def _samples_to(found: Sequence[dict], reward: float) -> float | None:
    """Samples at which the mean curve first reaches a reward, between its points."""
    xs, ys = _curve(found)
    xs, ys = np.r_[0, xs], np.r_[reward - _GAIN, ys]
    for index in range(1, len(xs)):
        if ys[index] >= reward:
            share = (reward - ys[index - 1]) / (ys[index] - ys[index - 1])
            return float(xs[index - 1] + share * (xs[index] - xs[index - 1]))
    return None


def _figures(part: str, rows: Sequence[tuple[tuple, list[dict]]], base: dict) -> Iterator[str]:
    seconds = _seconds()

    def cost(row: tuple) -> float | None:
        found = seconds.get(f"{row[0]}/{part}")
        return None if found is None else found["sampling"] + found["update"]

    axes: dict[str, tuple[str, Callable[[tuple, list[dict]], np.ndarray | None]]] = {
        "samples": ("samples drawn", lambda _, found: _curve(found)[0]),
        "flops": ("TFLOP", lambda _, found: _curve(found, "flops")[0] / 1e12),
        "seconds": (
            "seconds on two CPU cores",
            lambda row, found: None if cost(row) is None else _curve(found)[0] * cost(row),
        ),
    }
    start = base["seen"]["reward"]
    for axis, (across, of) in axes.items():
        series = []
        for row, found in rows:
            if row[0] in _DRAWN and (xs := of(row, found)) is not None:
                ys = _curve(found)[1]
                series.append(Series(row[0], [0.0, *xs.tolist()], [start, *ys.tolist()]))
        if series:
            file = plan.RESULTS / f"{part}-{axis}.svg"
            title = f"{TITLES[part]}: reward at guidance 5"
            atomic_write_text(file, standalone_paths(title, series, across))
            yield f"![Reward against {across}](objectives/{file.name})"
    yield ""


def _seconds() -> dict[str, dict[str, float]]:
    file = plan.RESULTS / "seconds.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _costs() -> Iterator[str]:
    found = _seconds()
    if not found:
        return
    yield (
        "Of one sample, drawn and trained on, on two CPU cores (96 samples an iteration). Bytes: "
        "what it keeps in the object store. FLOPs: of the U-Net and the decoder, without text "
        "encoder and rewards. PPO is measured with its KL penalty.\n"
    )
    columns = ("objective", "bytes", "GFLOP", "ms to draw and score", "ms to train")
    for part, title in TITLES.items():
        yield f"**{title}**\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}"
        for name in plan.OBJECTIVES:
            if (cost := found.get(f"{name}/{part}")) is not None:
                yield (
                    f"| {name} | {cost['bytes']:,.0f} | {cost['flops'] / 1e9:.2f} | "
                    f"{1e3 * cost['sampling']:.1f} | {1e3 * cost['update']:.1f} |"
                )
        yield ""


def _search() -> Iterator[str]:
    rates = sorted({*plan.RATES, *plan.BEYOND.values()})
    yield (
        f"Reward on the seen phrases after {plan.SEARCHED} iterations, one seed; two values of the "
        "other setting.\n"
    )
    yield f"| objective | {' | '.join(f'{rate:g}' for rate in rates)} |"
    yield f"| --- |{' --- |' * len(rates)}"
    runs = {(r.objective, r.part, r.rate, r.setting): r for r in
            (*plan.searched(), *plan.searched_beyond())}  # fmt: skip
    for name, chosen in plan.OBJECTIVES.items():
        key = chosen.key.rpartition(".")[2]
        for part in plan.PARTS:
            cells = []
            for rate in rates:
                tried = [runs.get((name, part, rate, value)) for value in chosen.values]
                scores = [plan.result(run) if run is not None else None for run in tried]
                known = [f"{score['seen']['reward']:.3f}" if score else "-" for score in scores]
                cells.append(" / ".join(known) if any(scores) else "")
            values = " / ".join(f"{value:g}" for value in chosen.values)
            yield f"| {name}, {part}, {key} {values} | {' | '.join(cells)} |"
    yield ""
