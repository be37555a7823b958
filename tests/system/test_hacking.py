"""A run whose reward is easily hacked: the user is warned while it happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.system.conftest import finish, start
from texforce_ray.config.io import load_config
from texforce_ray.observability.alarms import LearningAlarms

REWARDS = "rewards=[{target: 'tests.system.rewards:PlainRedness'}, {name: shapes, weight: 0}]"
DIVERGENCE = re.compile(
    r"^warning: iteration (\d+): reward/total_mean has risen from (\S+) to (\S+) over the last "
    r"\d+ iterations, while reward/shapes_mean, which is held out, has fallen from (\S+) to (\S+):",
    re.MULTILINE,
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hacked_reward_is_reported_within_ten_iterations(tmp_path: Path) -> None:
    """Trained on redness alone, the policy unlearns what its prompts ask for. Minutes."""
    settings = (
        REWARDS, "seed=0", "iterations=10", "objective.kl_weight=0", "eval.every=5",
        "eval.final_images=0", "eval.unseen=null", "eval.guidance_curve=[]",
    )  # fmt: skip
    directory = tmp_path / "run"
    process = start("--config", "configs/shapes.yaml", f"run_dir={directory}", *settings)
    finished = finish(process, directory, timeout=1700)
    assert finished.code == 0, finished.output
    curve = [
        (round(m["reward/total_mean"], 2), round(m["reward/shapes_mean"], 3))
        for m in finished.metrics
    ]
    print("redness and shapes:", *curve)
    found = DIVERGENCE.findall(finished.output)
    assert len(found) == 1, f"{curve}\n{finished.output}"
    iteration, *values = found[0]
    assert 0 < int(iteration) < 10
    trained, later, held_out, fallen = map(float, values)
    assert later > trained
    assert fallen < held_out
    last = finished.metrics[-1]
    assert last["eval/base_shapes"] > last["eval/shapes"]
    assert {"eval/high_frequency", "eval/grid", "eval/base_grid"} <= last.keys()
    assert "Trained and held-out rewards" in (directory / "report.html").read_text("utf-8")
    # Resumed, it would not be repeated.
    config = load_config(directory / "config.yaml", stored=True)
    lines = finished.metrics
    watch = LearningAlarms(lines, config.rewards, config.samples_per_iteration)
    assert not any("held out" in text for text in watch.look(lines[-1] | {"iteration": 10}))
