"""The dashboard asks for nothing that is not exported, and the page names all that is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from texforce_ray.records.metric_names import LIVE, METRICS, describe, markdown

REPO = Path(__file__).parents[2]
DASHBOARD = json.loads((REPO / "cluster" / "grafana" / "texforce.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
LABELS = {metric.prometheus: {metric.label} - {None} for metric in METRICS} | {
    name: set(labels) for name, (_, labels) in LIVE.items()
}


def _expressions() -> list[Any]:
    return [
        pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
        for panel in PANELS
        for target in panel["targets"]
    ]


@pytest.mark.parametrize("expression", _expressions())
def test_an_expression_uses_metrics_and_labels_that_there_are(expression: str) -> None:
    selectors = re.findall(r"ray_(\w+)\{([^}]*)\}", expression)
    assert selectors
    assert expression.count("(") == expression.count(")")
    grouped = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"by \(([^)]*)\)", expression))))
    for name, matchers in selectors:
        assert name in LABELS, f"{name} is not exported"
        used = set(re.findall(r"(\w+)(?:=~|!=|=)", matchers)) | grouped
        assert used <= LABELS[name] | {"run"}


def test_no_two_metrics_share_a_family() -> None:
    families = [metric.prometheus for metric in METRICS] + list(LIVE)
    assert len(set(families)) == len(families)


def test_all_that_a_run_should_show_has_a_panel() -> None:
    asked = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    for name in (
        "samples_per_second", "seconds{", "queue_length", "staleness", "restarts",
        "reward_masked_samples", "reward_mean", "reward_total_mean", "ppo_approx_kl", "actors",
    ):  # fmt: skip
        assert f"ray_texforce_{name}" in asked, name


def test_grafana_can_place_and_draw_every_panel() -> None:
    """What Grafana's importer needs: panels with ids of their own that do not overlap."""
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["id"] is None  # Grafana gives one
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource", "run"]


def test_the_variable_part_of_a_name_becomes_a_label() -> None:
    assert describe("reward/total_mean")[0].prometheus == "texforce_reward_total_mean"
    metric, labels = describe("reward/iqa:piqe_mean")
    assert (metric.prometheus, labels) == ("texforce_reward_mean", {"reward": "iqa:piqe"})
    assert describe("eval/base_shapes")[1] == {"reward": "shapes"}
    assert describe("something/new")[0].prometheus == "texforce_something_new"


def test_the_page_has_the_whole_table() -> None:
    text = (REPO / "docs" / "observability.md").read_text()
    assert markdown() in text
    assert text.count("| live, Prometheus only |") == 1
