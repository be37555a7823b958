"""The report shows what a run directory holds, safely, and needs nothing else."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from texforce_ray.records import charts
from texforce_ray.records.images import save_png
from texforce_ray.records.metrics import MetricsLog
from texforce_ray.records.report import write_report

NASTY = '</pre><script>alert("1")</script> & a red circle'


class _Checker(HTMLParser):
    """Collects the tags, and fails on one that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def _metrics(run_dir: Path, count: int = 6) -> None:
    with MetricsLog(run_dir) as log:
        for i in range(count):
            log.append(
                i,
                {
                    "reward/total_mean": 0.1 * i,
                    "reward/total_std": 0.05,
                    f"reward/{NASTY}_mean": 0.2,
                    f"reward/{NASTY}_correlation": 0.9,
                    "reward/masked": 1,
                    "ppo/approx_kl": math.nan if i == 2 else 1e-6,
                    "ppo/clipfrac": 0.0,
                    "ppo/ratio_error_first_pass": 0.0 if i == 0 else 10.0**-i,
                    "learner/grad_norm": 1.0,
                    "samples_per_second": 12.5,
                    "seconds/rollout": 3.0,
                    "seconds/learner": 2.0,
                    "seconds/total": 5.0,
                    **({"eval/unseen": 0.5} if i % 3 == 0 else {}),
                },
            )


def _full_run(run_dir: Path) -> None:
    _metrics(run_dir)
    (run_dir / "config.yaml").write_text(f"prompts: {NASTY}\n")
    for name, grey in (("step-9", 10), ("step-100", 20), ("step-10", 30)):
        save_png(run_dir / "images" / f"{name}.png", np.full((4, 4, 3), grey, np.uint8))
    save_png(run_dir / "evaluation" / "comparison.png", np.zeros((4, 4, 3), np.uint8))
    score = {"base": 0.4, "tuned": 0.8, "difference": 0.4, "low": 0.3, "high": 0.5, "images": 64}
    summary = json.dumps({"rewards": {NASTY: score}})
    (run_dir / "evaluation" / "summary.json").write_text(summary)


def test_full_run_has_every_section(tmp_path: Path) -> None:
    _full_run(tmp_path)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    text = path.read_text("utf-8")
    _Checker(text)
    figures = re.findall(r'<figure class="chart"><figcaption>(.*?)(?: <small>.*?)?</figcap', text)
    assert figures == [
        "Reward",
        "Reward components",
        "Correlation with the total",
        "Masked and gated",
        "eval/unseen",
        "Approximate KL",
        "Clipped fraction",
        "First-pass ratio error",
        "Gradient norm",
        "Throughput",
        "Time per iteration",
    ]
    assert text.count('class="band"') == 1
    assert "+0.4" in text
    assert "0.3 to 0.5" in text
    # First and newest by number: step-100 sorts before step-9 by name.
    captions = re.findall(r'<figure class="picture"><figcaption>(.*?)<', text)
    assert captions[1:] == ["step-9", "step-100"]


def test_a_held_out_reward_is_charted_beside_the_trained_one(tmp_path: Path) -> None:
    """On one scale: a standard deviation of the samples is one unit for each."""
    rewards = "rewards: [{target: 'm:Redness'}, {name: shapes, weight: 0}]\n"
    with MetricsLog(tmp_path) as log:
        for i in range(4):
            trained = {"reward/total_mean": 20.0 * i, "reward/total_std": 40.0}
            log.append(i, trained | {"reward/shapes_mean": 0.5 - 0.1 * i, "reward/shapes_std": 0.2})
    title = "Trained and held-out rewards"
    assert title not in write_report(tmp_path).read_text("utf-8")  # without a config
    (tmp_path / "config.yaml").write_text(rewards)
    text = write_report(tmp_path).read_text("utf-8")
    _Checker(text)
    chart = text[text.index(f"<figcaption>{title}") :].partition("</figure>")[0]
    assert re.findall(r"</i>(.*?) <b>(.*?)</b>", chart) == [
        ("total", "1.5"),
        ("shapes (held out)", "-1.5"),
    ]
    (tmp_path / "config.yaml").write_text(rewards.replace("weight: 0", "weight: 1"))
    assert title not in write_report(tmp_path).read_text("utf-8")


def test_nothing_in_the_report_runs_or_is_fetched(tmp_path: Path) -> None:
    _full_run(tmp_path)
    text = write_report(tmp_path).read_text("utf-8")
    page = _Checker(text)
    assert "&lt;/pre&gt;&lt;script&gt;" in text
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    attributes = [(name, value or "") for _, found in page.tags for name, value in found.items()]
    assert not [name for name, _ in attributes if name.startswith("on")]
    sources = [value for name, value in attributes if name in ("src", "xlink:href")]
    links = [value for name, value in attributes if name == "href"]
    assert links == ["evaluation", "metrics.jsonl"], "links lead to the run's own files alone"
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in text
    assert "@import" not in text


def test_every_chart_is_drawn_within_its_frame(tmp_path: Path) -> None:
    _full_run(tmp_path)
    text = write_report(tmp_path).read_text("utf-8")
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 11
    for drawing in drawings:
        svg = ElementTree.fromstring(drawing)
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        numbers = [
            (float(x), float(y))
            for mark in svg.iter()
            for x, y in (pair.split(",") for pair in mark.get("points", "").split())
        ]
        assert numbers or svg.findall("rect")
        assert all(0 <= x <= width and 0 <= y <= height for x, y in numbers)
        assert len(svg.findall("text")) >= 4, "an axis without numbers"


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.yaml", "images", "evaluation"])
def test_whatever_is_missing_leaves_only_its_section_out(tmp_path: Path, missing: str) -> None:
    _full_run(tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    text = write_report(tmp_path).read_text("utf-8")
    shown = {
        "metrics.jsonl": "<h2>Training",
        "config.yaml": "<summary>Config",
        "images": "<h2>Images",
        "evaluation": "<h2>Evaluation",
    }
    assert {name for name, mark in shown.items() if mark not in text} == {missing}


def test_empty_directory_still_gives_a_page(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text("utf-8")
    _Checker(text)
    assert "Nothing recorded yet" in text


@pytest.mark.parametrize("content", ["{", "[]", '{"rewards": {"a": 1}}', '{"rewards": null}'])
def test_broken_summary_does_not_take_the_report_along(tmp_path: Path, content: str) -> None:
    _full_run(tmp_path)
    (tmp_path / "evaluation" / "summary.json").write_text(content)
    text = write_report(tmp_path).read_text("utf-8")
    _Checker(text)
    assert "summary.json could not be read" in text
    assert "<h2>Training" in text


def test_braces_in_the_config_are_not_taken_for_placeholders(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: '{title} {body}'\n")
    assert "a: &#x27;{title} {body}&#x27;" in write_report(tmp_path).read_text("utf-8")


def test_long_run_stays_small(tmp_path: Path) -> None:
    lines = [
        {"iteration": i, "reward/total_mean": i, "seconds/a": 1.0, "seconds/b": 2.0}
        for i in range(5000)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert write_report(tmp_path).stat().st_size < 250_000


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0], [-3.2, 7.9], [1e-7, 9e-7], [0.0, 1e6], [1e-300], [0.1, 0.1 + 1e-12]],
)
def test_axis_has_round_increasing_ticks_around_the_values(values: list[float]) -> None:
    for zero in (False, True):
        axis = charts.linear_axis(values, zero=zero)
        assert 2 <= len(axis.ticks) <= 9
        assert list(axis.ticks) == sorted(set(axis.ticks))
        assert all(-1e-6 <= axis.place(value) <= 1 + 1e-6 for value in values)


@pytest.mark.parametrize("values", [[0.0], [1e-5], [0.0, 1e-7, 3e-2], [1e-30, 1e10]])
def test_log_axis_takes_zeros_and_wide_ranges(values: list[float]) -> None:
    axis = charts.log_axis(values)
    assert len(axis.ticks) <= 8
    places = [axis.place(value) for value in values]
    assert all(0 <= place <= 1 + 1e-9 for place in places)
    assert places == sorted(places)
    assert len(set(places)) == len(places), "0 must not look like the smallest value"


def test_single_iteration_is_drawn() -> None:
    chart = charts.line_chart("Reward", [charts.Series("total", [0], [0.5])])
    assert "<circle" in chart
    assert "<rect" in charts.stacked_bars("Time", [0], [("rollout", [2.0])])
    assert charts.line_chart("Reward", [charts.Series("total", [0], [None])]) == ""
