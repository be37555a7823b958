"""`report.html`: one self-contained page about a run, without JavaScript."""

from __future__ import annotations

import base64
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from texforce_ray.config.io import load_config
from texforce_ray.config.rewards import trends_of
from texforce_ray.errors import TexForceError, shareable_yaml
from texforce_ray.files import atomic_write_text, from_json
from texforce_ray.records.charts import Series, line_chart, path_chart, stacked_bars
from texforce_ray.records.matched import curve_of
from texforce_ray.records.metrics import read_metrics
from texforce_ray.records.page import PAGE

Metrics = list[dict[str, Any]]
_STRIP = 12


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Build `report.html` (or `out`) from the files in `run_dir` and return its path.

    Sections without data are left out, so it also works during a run and after a crash.

    Raises:
        RunDirectoryError: the page cannot be written, or `metrics.jsonl` is damaged.
    """
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir)
    sections = (
        _key_figures(metrics),
        _evaluation(run_dir / "evaluation"),
        _grids(run_dir / "images"),
        _strip(run_dir / "images"),
        _charts(metrics, _trends(run_dir)),
        _links(run_dir, (out or run_dir / "report.html").parent),
        _config(run_dir / "config.yaml"),
    )
    page = PAGE.replace("{title}", escape(run_dir.resolve().name))
    page = page.replace("{body}", "".join(filter(None, sections)) or "<p>Nothing recorded yet.</p>")
    path = out or run_dir / "report.html"
    atomic_write_text(path, page)
    return path


def _key_figures(metrics: Metrics) -> str:
    if not metrics:
        return ""
    figures = [("iterations recorded", str(len(metrics)))]
    rewards = [v for v in values(metrics, "reward/total_mean") if v is not None]
    if rewards:
        figures.append(("reward, first iteration", number(rewards[0])))
        figures.append(("reward, last iteration", number(rewards[-1])))
    speeds = sorted(v for v in values(metrics, "samples_per_second") if v is not None)
    if speeds:
        figures.append(("samples per second, median", number(speeds[len(speeds) // 2])))
    tiles = "".join(f"<div><b>{value}</b>{escape(name)}</div>" for name, value in figures)
    return f'<section class="figures">{tiles}</section>'


def _trends(run_dir: Path) -> tuple[list[str], list[str]]:
    """Names of the trained and of the held-out rewards; none if there is no valid config."""
    try:
        return trends_of(load_config(run_dir / "config.yaml", stored=True).rewards)
    except TexForceError:
        return [], []


def _charts(metrics: Metrics, trends: tuple[list[str], list[str]]) -> str:
    if not metrics:
        return ""
    keys = list(dict.fromkeys(key for record in metrics for key in record))

    def one(key: str, spread: str = "") -> Series:
        return _series(metrics, key, key.partition("/")[2] or key, spread)

    def rewards(ending: str) -> list[str]:
        return [k for k in keys if k.startswith("reward/") and k.endswith(ending)]

    components = [key for key in rewards("_mean") if key != "reward/total_mean"]
    charts = [
        line_chart("Reward", [one("reward/total_mean", "reward/total_std")], note=_band_note(keys)),
        _held_out_chart(metrics, *trends),
        line_chart("Reward components", [one(key) for key in components], note="raw values"),
        # A component near 1 decides the total alone, one near 0 is drowned out by the others.
        line_chart("Correlation with the total", [one(key) for key in rewards("_correlation")]),
        line_chart("Masked and gated", [one(k) for k in rewards("masked") + rewards("_gated")]),
        *(line_chart(key, [one(key)]) for key in keys if key in _evaluations(keys)),
        _drift_chart(metrics),
        line_chart("Differentiable reward", [one("direct/reward")]),
        line_chart("Approximate KL", [one("ppo/approx_kl")]),
        line_chart("KL to the base model", [one("ppo/kl_base")]),
        line_chart("Clipped fraction", [one("ppo/clipfrac")], zero=True),
        line_chart(
            "First-pass ratio error",
            [one("ppo/ratio_error_first_pass")],
            log=True,
            note="log scale, 0 at the bottom",
        ),
        line_chart("Gradient norm", [one("learner/grad_norm")], zero=True),
        line_chart("Throughput", [one("samples_per_second")], zero=True, note="samples per second"),
        _time_shares(metrics, keys),
    ]
    return f'<section><h2>Training</h2><div class="charts">{"".join(charts)}</div></section>'


def _held_out_chart(metrics: Metrics, trained: list[str], held_out: list[str]) -> str:
    """Trained and held-out rewards on one scale, so that a divergence is seen."""
    series = []
    for name in trained + held_out:
        one = _series(metrics, f"reward/{name}_mean", name, "")
        spread = [std for std in values(metrics, f"reward/{name}_std") if std]
        known = [y for y in one.ys if y is not None]
        if not known or not spread:
            continue
        unit = statistics.median(spread)
        ys = [None if y is None else (y - known[0]) / unit for y in one.ys]
        series.append(Series(f"{name}{' (held out)' * (name in held_out)}", one.xs, ys))
    return line_chart(
        "Trained and held-out rewards",
        series if held_out else [],
        note="change since the first iteration, in standard deviations of the samples",
    )


def _evaluations(keys: Sequence[str]) -> list[str]:
    # With one reward, its mean is the total. The base model's score starts the drift curve.
    single = len([k for k in keys if k.startswith("reward/") and k.endswith("_mean")]) <= 2
    chosen = [k for k in keys if k.startswith("eval/") and not k.startswith("eval/base_")]
    return [key for key in chosen if not (single and key == "eval/total")]


def _drift_chart(metrics: Metrics) -> str:
    curve = curve_of("run", metrics)
    return path_chart(
        "Reward against appearance drift",
        [Series("reward", curve.drift, curve.reward)] if curve.reward else [],
        "drift from the base model",
        note="evaluation",
    )


def _band_note(keys: Sequence[str]) -> str:
    return "mean ± standard deviation" if "reward/total_std" in keys else "mean"


def _time_shares(metrics: Metrics, keys: Sequence[str]) -> str:
    # A total beside its parts would be counted twice.
    names = [key for key in keys if key.startswith("seconds/") and key != "seconds/total"]
    rows = [record for record in metrics if any(finite(record.get(name)) for name in names)]
    parts = [
        (name.partition("/")[2], [finite(record.get(name)) or 0.0 for record in rows])
        for name in names
    ]
    return stacked_bars(
        "Time per iteration", [record["iteration"] for record in rows], parts, note="seconds"
    )


def _series(metrics: Metrics, key: str, name: str, spread: str) -> Series:
    # Only records that have the key, so that evaluations every 10 iterations still form a line.
    rows = [record for record in metrics if key in record]
    band = values(rows, spread) if spread and any(spread in record for record in rows) else None
    return Series(name, [record["iteration"] for record in rows], values(rows, key), band)


def values(metrics: Metrics, key: str) -> list[float | None]:
    """A column of the metrics, None where there is no finite number."""
    return [finite(record.get(key)) for record in metrics]


def finite(value: Any) -> float | None:
    """Return `value` if it is a finite number, else None: files may be edited by hand."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _evaluation(directory: Path) -> str:
    scores = _scores(directory / "summary.json")
    picture = _picture(directory / "comparison.png", "Same prompts and seeds, base and tuned")
    if not scores and not picture:
        return ""
    return f"<section><h2>Evaluation: base and tuned</h2>{scores}{picture}</section>"


def _scores(path: Path) -> str:
    """Tables of the rewards, on unseen prompts too, and the curve over guidance."""
    if not path.is_file():
        return ""
    try:
        summary = from_json(path.read_text("utf-8"))
        tables = _score_table(summary["rewards"])
        if unseen := summary.get("unseen"):
            tables += f"<h3>On prompts that were never trained on</h3>{_score_table(unseen)}"
        return tables + _guidance_charts(summary.get("guidance") or [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"<p>evaluation/summary.json could not be read: {escape(repr(error))}</p>"


def _guidance_charts(points: Sequence[Mapping[str, Any]]) -> str:
    charts = []
    for name in dict.fromkeys(str(point["prompts"]) for point in points):
        row = [point for point in points if point["prompts"] == name]
        scales = [float(point["guidance_scale"]) for point in row]
        series = [Series(w, scales, [finite(p.get(w)) for p in row]) for w in ("base", "tuned")]
        note = f"{number(row[0].get('images'))} images each"
        charts.append(
            path_chart(f"Reward over guidance, {name} prompts", series, "guidance", note=note)
        )
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _score_table(rewards: Mapping[str, Any]) -> str:
    rows = "".join(_score_row(name, scores) for name, scores in rewards.items())
    return (
        '<div class="wide"><table><tr><th>Reward</th><th>Base</th><th>Tuned</th>'
        "<th>Difference</th><th>95 % interval</th><th>Images</th></tr>"
        f"{rows}</table></div>"
    )


def _score_row(name: str, scores: dict[str, Any]) -> str:
    low, high = scores.get("low"), scores.get("high")
    difference = finite(scores.get("difference"))
    # Coloured only if the interval excludes 0; otherwise the sign is uncertain.
    sure = (finite(low) or 0) > 0 or (finite(high) or 0) < 0
    kind = ("" if not sure else "up" if (difference or 0) > 0 else "down") if difference else ""
    signed = "-" if difference is None else f"{difference:+.4g}"
    cells = [number(scores.get("base")), number(scores.get("tuned"))]
    interval = f"{number(low)} to {number(high)}"
    return (
        f"<tr><td>{escape(str(name))}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}"
        f'<td class="{kind}">{signed}</td><td>{interval}</td>'
        f"<td>{number(scores.get('images'))}</td></tr>"
    )


def _grids(directory: Path) -> str:
    paths = sorted(directory.glob("step-*.png"), key=_in_number_order)
    chosen = paths if len(paths) < 2 else [paths[0], paths[-1]]
    pictures = "".join(_picture(path, path.stem) for path in chosen)
    return f'<section><h2>Images</h2><div class="pair">{pictures}</div></section>' * bool(pictures)


def _strip(directory: Path) -> str:
    """The same images over training, one row for each evaluation; a dozen rows at most."""
    paths = sorted(directory.glob("row-*.png"), key=_in_number_order)
    if len(paths) < 2:
        return ""
    picks = [round(i * (len(paths) - 1) / (_STRIP - 1)) for i in range(_STRIP)]
    chosen = paths if len(paths) <= _STRIP else [paths[i] for i in dict.fromkeys(picks)]
    rows = "".join(strip_row(path, f"after {step_of(path)}") for path in chosen)
    return f'<section><h2>Over training</h2><div class="strip">{rows}</div></section>'


def strip_row(path: Path, label: str) -> str:
    """One row of images with its label; "" if it cannot be read."""
    image = embedded(path, label)
    return f"<div><span>{escape(label)}</span>{image}</div>" if image else ""


def step_of(path: Path) -> int:
    """The iterations in a picture's name, e.g. row-00012.png."""
    return int(path.stem.rpartition("-")[2])


def _in_number_order(path: Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", path.stem)], path.stem


def _picture(path: Path, caption: str) -> str:
    image = embedded(path, caption)
    if not image:
        return ""
    return f'<figure class="picture"><figcaption>{escape(caption)}</figcaption>{image}</figure>'


def embedded(path: Path, alt: str) -> str:
    """An `<img>` that holds the PNG itself; "" if it cannot be read."""
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError:
        return ""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _links(run_dir: Path, page: Path) -> str:
    """The run's other files, as seen from the page's folder."""
    names = ("adapter", "evaluation", "samples", "checkpoints", "metrics.jsonl")
    links = [
        f'<a href="{escape(quote(os.path.relpath(run_dir / name, page)))}">{name}</a>'
        for name in names
        if (run_dir / name).exists()
    ]
    return f"<section><h2>Files</h2><p>{' · '.join(links)}</p></section>" * bool(links)


def _config(path: Path) -> str:
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
    return (
        "<section><details><summary>Configuration (config.yaml)</summary>"
        f"<pre>{escape(shareable_yaml(text))}</pre></details></section>"
    )


def number(value: Any) -> str:
    """Four significant digits, or a dash if it is not a finite number."""
    known = finite(value)
    return "-" if known is None else f"{known:.4g}"
