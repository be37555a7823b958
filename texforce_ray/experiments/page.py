"""The results page: tables and figures from the kept files, with the hand-written discussion."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from texforce_ray.experiments.results import Row, curves, rows, seeds_of
from texforce_ray.experiments.shapes import EXPERIMENTS
from texforce_ray.experiments.stages import Evaluate, Stage, Sweep
from texforce_ray.files import atomic_write_text
from texforce_ray.records.charts import Series, standalone_paths
from texforce_ray.records.matched import Curve, matched_reward

_INTRODUCTION = """\
# The paper's experiments in the shapes world

Made by `make paper-shapes` (`python -m texforce_ray.experiments shapes`) from the files in
`{folder}/` beside this page; the discussion is written by hand. Training seeds: {seeds}.

{columns}"""

_RATES = """\
# Learning rates in the shapes world

For every method of the [headline](shapes.md), the best of four learning rates is used, chosen
after ten iterations with training seed {seeds}, which the experiments do not use. The configs in
`configs/shapes/` hold them; incompressibility, hands and faces have smaller, unsearched ones.

Made by `python -m texforce_ray.experiments shapes --only rates --seeds {seeds}
--out runs/rates --results docs/results/rates`. The rate given for
joint training is the text encoder's; the U-Net's is two thirds of it.

{columns}"""

_COLUMNS = """\
Rewards are means over the same 256 images for every policy, at seeds that are never trained on.
Differences are paired with the base model. Intervals are 95 % bootstraps that resample training
seeds and prompts independently, each prompt with all of its images: they estimate how the result
would vary with other seeds and other prompts of this kind, only roughly when there are as few as
here. Diversity: mean distance of two images of one prompt. Drift: mean distance from the base
model's image at the same seed. Both: root mean squares over 16 x 16 thumbnails, 0 to 1. Style
drift: the same for the distributions of colours, edges and local contrast, wherever they are in the
image (Wasserstein distances), so an object that has only moved adds nothing."""

_TITLES = {
    "rates": "Learning rates",
    "headline": "Text encoder, U-Net, both (Fig. 5, Tables 1 and 3)",
    "fusion": "Fused with less guidance, and with smaller weights",
    "many": "Many prompts (Table 1)",
    "penalty": "Without the KL penalty (Fig. 5, DPOK)",
    "incompression": "Incompressibility (Fig. 4)",
    "people": "Hands and faces (Fig. 11)",
    "blend": "Blends of two tasks (Fig. 12)",
}
_SETS = {
    "shapes": "all training prompts",
    "shapes-unseen": "prompts with held-out pairs",
    "shapes-phrases": "seen phrases",
    "shapes-phrases-unseen": "unseen phrases",
    "hands": "hands",
    "faces": "faces",
}
_CURVES = {
    "headline": ("text", "unet", "refl", "joint"),
    "incompression": ("incompression-text", "incompression-unet"),
}


def write_page(results: Path, page: Path) -> None:
    """Write `page` (Markdown) from the kept `results`; what does not exist yet is left out."""
    seeds = seeds_of(results)
    introduction = _RATES if results.name == "rates" else _INTRODUCTION
    given = {"folder": results.name, "seeds": ", ".join(map(str, seeds)), "columns": _COLUMNS}
    lines = [introduction.format(**given)]
    discussion = results / "discussion.md"
    if discussion.is_file():
        lines += ["", discussion.read_text().strip()]
    for name, stages in EXPERIMENTS.items():
        found = list(_experiment(name, stages, results, page))
        if found:
            lines += ["", f"## {_TITLES[name]}", *found]
    atomic_write_text(page, "\n".join(lines) + "\n")


def _experiment(name: str, stages: tuple[Stage, ...], results: Path, page: Path) -> Iterator[str]:
    for stage in stages:
        if isinstance(stage, Evaluate):
            for prompts in stage.prompts:
                if found := rows(results, stage, prompts):
                    yield from _table(found, stage, prompts, results, page)
        elif isinstance(stage, Sweep):
            yield from _picture(results, page, f"{stage.name}/sweep.png", "weights of the blend")
    yield from _matched(name, results, page)


def _table(
    found: list[Row], stage: Evaluate, prompts: str, results: Path, page: Path
) -> Iterator[str]:
    yield ""
    title = _SETS.get(prompts, prompts)
    note = f", {stage.note}" if stage.note else ""
    reward = "" if prompts in _SETS else f" ({stage.config})"
    yield f"**{title[0].upper()}{title[1:]}{note}**{reward}"
    yield ""
    columns = ["policy", "reward", "against base", "95 %", "by seed", "better in", *found[0].parts]
    columns += ["diversity", "drift", "style drift"]
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for row in found:
        cells = [row.label, f"{row.reward:.3f}"]
        if row.label == "base":
            cells += ["", "", "", ""]
        else:
            seeds = ", ".join(f"{value:+.3f}" for value in row.by_seed)
            cells += [
                f"{row.difference:+.3f}", f"{row.low:+.3f} to {row.high:+.3f}", seeds,
                f"{row.win_rate:.0%}",
            ]  # fmt: skip
        base = row.label == "base"
        cells += [f"{m:.3f}" + ("" if base else f" ({d:+.3f})") for m, d in row.parts.values()]
        cells += [f"{row.diversity:.3f}", f"{row.drift:.3f}", f"{row.style_drift:.3f}"]
        yield f"| {' | '.join(cells)} |"
    yield from _picture(results, page, f"{stage.name}/{prompts}/comparison.png", title)


def _picture(results: Path, page: Path, name: str, caption: str) -> Iterator[str]:
    files = sorted(results.glob(f"seed-*/{name}"))
    if files:
        yield ""
        yield f"![{caption}]({_link(files[0], page)})"


def _matched(name: str, results: Path, page: Path) -> Iterator[str]:
    """Reward against drift over training, and the drift at a reward that all reached."""
    found = [curve for curve in curves(results, _CURVES.get(name, ())) if curve.reward]
    if len(found) < 2:
        return
    figure = results / f"{name}-drift.svg"
    series = [Series(curve.name, curve.drift, curve.reward) for curve in found]
    atomic_write_text(
        figure, standalone_paths("Reward against drift over training", series, "drift")
    )
    yield ""
    yield f"![reward against drift]({_link(figure, page)})"
    reward = matched_reward(found)
    if reward is not None:
        yield ""
        yield f"At the reward that all of them reached ({reward:.3f}) the drift from the base is"
        yield ", ".join(_drift(curve, reward) for curve in found) + "."


def _drift(curve: Curve, reward: float) -> str:
    drift = curve.drift_at(reward)
    return f"{curve.name} {drift:.3f}" if drift is not None else f"{curve.name} unknown"


def _link(target: Path, page: Path) -> str:
    return os.path.relpath(target, page.parent)
