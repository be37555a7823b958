"""Several runs on one page: overlaid curves, appearance at matched reward, images side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from texforce_ray.errors import RunDirectoryError
from texforce_ray.files import atomic_write_text
from texforce_ray.records.charts import Series, line_chart, path_chart
from texforce_ray.records.matched import Curve, curve_of, matched_reward, shared_reward
from texforce_ray.records.metrics import read_metrics
from texforce_ray.records.page import PAGE
from texforce_ray.records.report import Metrics, number, step_of, strip_row, values

# Keys to compare runs by, with their charts' titles; the other keys differ from run to run.
_CHARTS = {
    "reward/total_mean": "Reward",
    "eval/total": "Evaluation reward",
    "eval/diversity": "Diversity",
    "eval/drift": "Drift from the base model",
    "ppo/approx_kl": "Approximate KL",
    "ppo/clipfrac": "Clipped fraction",
    "learner/grad_norm": "Gradient norm",
    "samples_per_second": "Samples per second",
    "seconds/total": "Seconds per iteration",
}


@dataclass(frozen=True)
class _Run:
    label: str
    path: Path
    metrics: Metrics
    reward: str  # shared by all runs of the page

    @property
    def curve(self) -> Curve:
        return curve_of(self.label, self.metrics, self.reward)


def write_overlay(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained page that compares runs, and return its path.

    Raises:
        RunDirectoryError: a directory that holds no metrics, or the page cannot be written.
    """
    metrics = [read_metrics(path) for path in run_dirs]
    reward = shared_reward(metrics) or ""
    parts = zip(labels(run_dirs), run_dirs, metrics, strict=True)
    runs = [_Run(label, path, found, reward) for label, path, found in parts]
    if empty := [str(run.path) for run in runs if not run.metrics]:
        raise RunDirectoryError(
            f"no metrics in {', '.join(empty)}: not a run, or no iteration is finished yet"
        )
    body = [_table(runs), _matched(runs), _charts(runs), _ends(runs), _links(runs, out)]
    page = PAGE.replace("{title}", escape(" · ".join(run.label for run in runs)))
    atomic_write_text(out, page.replace("{body}", "".join(body)))
    return out


def labels(run_dirs: Sequence[Path]) -> list[str]:
    """Short, distinct names: as many of each path's last parts as needed."""
    parts = [path.resolve().parts for path in run_dirs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise RunDirectoryError("a run directory is given twice")


def _table(runs: Sequence[_Run]) -> str:
    head = "<th>Run</th><th>Iterations</th><th>Samples/s</th><th>Reward, first</th>"
    head += "<th>Reward, last</th><th>Evaluation, base</th><th>Evaluation, last</th><th>Drift</th>"
    rows = []
    for run in runs:
        rewards = [v for v in values(run.metrics, "reward/total_mean") if v is not None]
        speeds = sorted(v for v in values(run.metrics, "samples_per_second") if v is not None)
        curve = run.curve
        cells: list[Any] = [len(run.metrics), speeds[len(speeds) // 2] if speeds else None]
        cells += [rewards[0], rewards[-1]] if rewards else [None, None]
        cells += [curve.reward[0], curve.reward[-1]] if curve.reward else [None, None]
        cells += [curve.drift[-1] if curve.drift else None]
        text = "".join(f"<td>{number(cell)}</td>" for cell in cells)
        rows.append(f"<tr><td>{escape(run.label)}</td>{text}</tr>")
    return (
        f'<section><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div></section>'
    )


def _matched(runs: Sequence[_Run]) -> str:
    """Claim (b) of the paper: at the same reward, which run has changed the images more?"""
    curves = [run.curve for run in runs]
    reward = matched_reward(curves)
    if reward is None or len(runs) < 2:
        return ""
    rows, strip = [], [_nearest(runs[0].path, 0, "base model")]
    for run, curve in zip(runs, curves, strict=True):
        drift, step = curve.drift_at(reward), _step_at(curve, reward)
        rows.append(f"<tr><td>{escape(run.label)}</td><td>{number(drift)}</td><td>{step}</td></tr>")
        strip.append(_nearest(run.path, step, f"{run.label}, after {step}"))
    shown = "".join(strip)
    return (
        f"<section><h2>At matched reward ({escape(runs[0].reward)} {number(reward)})</h2>"
        '<div class="wide"><table><tr><th>Run</th><th>Drift from the base model</th>'
        f"<th>Iterations at first evaluation there</th></tr>{''.join(rows)}</table></div>"
        f"{f'<div class=strip>{shown}</div>' if shown else ''}</section>"
    )


def _step_at(curve: Curve, reward: float) -> int:
    """Iterations of the first evaluation that reached a reward."""
    pairs = zip(curve.iterations, curve.reward, strict=True)
    return next(iteration for iteration, value in pairs if value >= reward)


def _nearest(run_dir: Path, step: int, label: str) -> str:
    """The row of images of the evaluation nearest to `step`."""
    paths = list((run_dir / "images").glob("row-*.png"))
    if not paths:
        return ""
    return strip_row(min(paths, key=lambda path: abs(step_of(path) - step)), label)


def _charts(runs: Sequence[_Run]) -> str:
    keys = dict.fromkeys(key for run in runs for record in run.metrics for key in record)
    components = [k for k in keys if k.startswith("reward/") and k.endswith("_mean")]
    titles = _CHARTS | {k: k for k in components if k not in _CHARTS}
    charts = [
        path_chart(
            f"Reward ({runs[0].reward}) against appearance drift",
            [Series(c.name, c.drift, c.reward) for run in runs if (c := run.curve).reward],
            "drift from the base model",
        )
    ]
    for key, title in titles.items():
        series = [_series(run, key) for run in runs]
        charts.append(line_chart(title, [s for s in series if s.xs]))
    return f'<section><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>'


def _series(run: _Run, key: str) -> Series:
    rows = [record for record in run.metrics if key in record]
    return Series(run.label, [record["iteration"] for record in rows], values(rows, key))


def _ends(runs: Sequence[_Run]) -> str:
    """The base model and every run's last evaluation, same prompts and seeds."""
    last = 10**9
    rows = [_nearest(runs[0].path, 0, "base model")]
    rows += [_nearest(run.path, last, run.label) for run in runs]
    shown = "".join(rows)
    return f'<section><h2>At the end</h2><div class="strip">{shown}</div></section>' * bool(shown)


def _links(runs: Sequence[_Run], out: Path) -> str:
    """Where each run's own report and adapter are, as seen from the page."""
    lines = []
    for run in runs:
        found = [
            f'<a href="{escape(quote(os.path.relpath(run.path / name, out.parent)))}">{text}</a>'
            for name, text in (("report.html", "report"), ("adapter", "adapter"))
            if (run.path / name).exists()
        ]
        lines.append(f"<li>{escape(run.label)}: {', '.join(found) or 'unfinished'}</li>")
    return f"<section><h2>Runs</h2><ul>{''.join(lines)}</ul></section>"
