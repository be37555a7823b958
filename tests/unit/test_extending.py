"""What docs/extending.md shows: an objective, a process and a backbone of your own."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.unit.references import Ref
from texforce_ray.actors.learner import LearnerActor
from texforce_ray.actors.messages import UpdateTask, WorkUnit
from texforce_ray.actors.rollout import RolloutActor
from texforce_ray.artifacts.families import own_family
from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.driver.inputs import check_inputs
from texforce_ray.errors import ConfigError
from texforce_ray.rl.objectives import learner_class

pytestmark = pytest.mark.usefixtures("no_cluster", "examples")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def _config(**sections: Any) -> Config:
    return make_config(
        {
            "diffusion": {"steps": 4, "guidance_scale": 2.0},
            "prompts": {"per_iteration": 2, "samples_per_prompt": 2},
            "rollout": {"batch_size": 4},
            "advantage": {"mode": "batch"},
            "lora": {"text_encoder": {"rank": 4, "alpha": 4.0}},
            "update": {"minibatches": 1},
        }
        | sections
    )


def _updated(config: Config) -> tuple[dict[str, float], Any]:
    """One iteration by the actors themselves: metrics, and the trajectory."""
    learner, rollout = LearnerActor(config), RolloutActor(config)
    _, *learned = learner.initialize([])
    refs: list[Any] = [Ref(part, str(index)) for index, part in enumerate(learned)]
    prompts = ("a green circle", "a green circle", "two red squares", "two red squares")
    unit = WorkUnit(0, 0, prompts, ({},) * 4, np.arange(4), 0)
    _, trajectory, _ = rollout.sample(unit, refs[:1])
    task = UpdateTask(
        0, [Ref(trajectory, "t")], np.array([1.0, -1.0, 0.5, -0.5]), np.ones(4, bool), refs
    )  # type: ignore[list-item]
    updated, snapshot, *_ = learner.update(task)
    assert snapshot is not None
    assert snapshot.changes
    return updated.metrics, trajectory


def _lines(*things: Any) -> int:
    return sum(len(inspect.getsource(thing).splitlines()) for thing in things)


def test_an_objective_of_ones_own() -> None:
    import own_objective  # type: ignore[import-not-found]

    config = _config(
        objective={
            "kind": "custom",
            "target": "own_objective:RewardWeighted",
            "kwargs": {"temperature": 0.5},
        }
    )
    metrics, trajectory = _updated(config)
    assert metrics["rwr/loss"] > 0
    assert metrics["learner/grad_norm"] > 0
    assert trajectory.latents.shape[1] == 1
    assert _lines(own_objective.RewardWeighted) < 40


@pytest.mark.long
def test_its_gradient_is_the_same_in_one_shard_and_in_two() -> None:
    target = {"kind": "custom", "target": "own_objective:RewardWeighted"}
    objective = target | {"kwargs": {"temperature": 0.5}}
    one, two = (
        _updated(_config(objective=objective, learner={"gradient_shards": shards}))[0]
        for shards in (1, 2)
    )
    assert one["rwr/loss"] == pytest.approx(two["rwr/loss"], rel=1e-5)
    assert one["learner/grad_norm"] == pytest.approx(two["learner/grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("target", "match"),
    [("nowhere:X", "cannot be imported"), ("json:JSONDecoder", "is not a subclass")],
)
def test_a_target_that_is_not_an_objective_is_named(target: str, match: str) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.target: .*{match}"):
        learner_class(_config(objective={"kind": "custom", "target": target}))


@pytest.fixture(scope="module")
def flow_pipeline(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with a flow-matching scheduler, which no family of ours takes."""
    path = tmp_path_factory.mktemp("flow") / "pipeline"
    shutil.copytree(tiny_pipeline, path)
    FlowMatchEulerDiscreteScheduler().save_pretrained(path / "scheduler")
    index = json.loads((path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def test_a_process_and_a_backbone_of_ones_own(flow_pipeline: Path) -> None:
    import own_backbone  # type: ignore[import-not-found]

    model = {"path": str(flow_pipeline), "family": "own_backbone:FLOW"}
    config = _config(model=model, diffusion={"steps": 4, "guidance_scale": 2.0, "eta": 0.8})
    metrics, trajectory = _updated(config)
    assert metrics["ppo/ratio_error_first_pass"] < 1e-4
    assert trajectory.timesteps.tolist() == [1000, 750, 500, 250]
    assert _lines(own_backbone.FlowCps) < 40
    assert _lines(own_backbone.FlowUnet) < 15


def test_a_run_finds_it_before_anything_starts(flow_pipeline: Path, tiny_pipeline: Path) -> None:
    path = str(flow_pipeline)
    check_inputs(_config(model={"path": path, "family": "own_backbone:FLOW"}))
    with pytest.raises(ConfigError, match="is a FlowMatchEulerDiscreteScheduler"):
        check_inputs(_config(model={"path": path}))  # the one before it has left nothing behind
    with pytest.raises(ConfigError, match=r"_class_name.*FlowMatchEulerDiscreteScheduler"):
        check_inputs(_config(model={"path": str(tiny_pipeline), "family": "own_backbone:FLOW"}))


def test_an_objective_that_is_nowhere_is_named_before_anything_starts() -> None:
    objective = {"kind": "custom", "target": "nowhere.at_all:X"}
    with pytest.raises(ConfigError, match=r"objective\.target: 'nowhere\.at_all:X' cannot be"):
        check_inputs(_config(objective=objective))


def test_that_process_keeps_what_it_noises() -> None:
    from own_backbone import FlowCps  # type: ignore[import-not-found]

    levels = torch.linspace(1, 0, 5)
    process = FlowCps(levels[:-1] * 1000, levels[:-1], levels[1:], 0.8)
    clean, noise = torch.randn(2, 1, 4, 8, 8)
    for index in range(4):
        step = torch.tensor([index])
        x = process.forward(step, clean, noise)
        velocity = noise - clean
        torch.testing.assert_close(process.x0(step, x, velocity), clean, rtol=1e-5, atol=1e-5)
        # Mean and spread of the next latent are those of a sample at the next noise level.
        fresh = process.advance(step, process.mean(step, x, velocity), torch.zeros_like(x))
        kept = float(torch.cos(torch.tensor(0.4 * torch.pi)))
        following = float(levels[index + 1])
        expected = (1 - following) * clean + following * kept * noise
        torch.testing.assert_close(fresh, expected, rtol=1e-5, atol=1e-5)
    assert process.trainable == [0, 1, 2]


def test_a_target_that_is_not_a_family_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.family: 'json:dumps' is not a"):
        own_family("json:dumps")
