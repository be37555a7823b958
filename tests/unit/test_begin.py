"""A run may start from an adapter: exactly where the shapes agree, not at all where they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.references import Ref
from texforce_ray.actors.learner import LearnerActor
from texforce_ray.actors.messages import UpdateTask, WorkUnit, unpack_images
from texforce_ray.actors.rollout import RolloutActor
from texforce_ray.artifacts.snapshot import LoraShape, PolicySnapshot
from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.driver.inputs import check_inputs
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter_files import export_adapter, read_adapter

pytestmark = pytest.mark.usefixtures("no_cluster")

UNIT = WorkUnit(0, 0, ("a green circle", "two red squares"), ({}, {}), np.array([1, 2]), 0)


def _config(**lora: Any) -> Config:
    return make_config(
        {
            "diffusion": {"steps": 2, "guidance_scale": 2.0},
            "prompts": {"per_iteration": 2, "samples_per_prompt": 1},
            "rollout": {"batch_size": 2},
            "lora": {"text_encoder": {"rank": 4, "alpha": 4.0}} | lora,
            "update": {"minibatches": 1},
            "advantage": {"mode": "batch"},
            "optimizer": {"ema_decay": 0.9},
        }
    )


@pytest.fixture
def adapter(tmp_path: Path, randomize: Callable[..., None]) -> Path:
    """The exported adapter of an earlier run."""
    earlier = LearnerActor(_config())
    randomize(earlier.learner.adapter, seed=5, scale=0.1)
    export_adapter(earlier.learner.learned().snapshot, tmp_path / "A", "embedded")
    return tmp_path / "A"


def _ref(snapshot: Any, name: str) -> Any:
    return Ref(snapshot, name)


def test_the_first_images_are_those_of_the_adapter(adapter: Path) -> None:
    begin = read_adapter(adapter)
    learner, rollout = LearnerActor(_config()), RolloutActor(_config())
    _, snapshot, state, average = learner.initialize([], [_ref(begin, "A")])
    assert state is not None
    assert state.version == 0
    _, trajectory, images = rollout.sample(UNIT, [_ref(snapshot, "first")])
    _, expected = RolloutActor(_config()).generate(
        UNIT.prompts, UNIT.seeds, [_ref(begin, "A")], 2.0
    )
    np.testing.assert_array_equal(unpack_images(images), unpack_images(expected))
    _, base = rollout.generate(UNIT.prompts, UNIT.seeds, [], 2.0)
    assert (unpack_images(images) != unpack_images(base)).any()
    # What is averaged for evaluation starts there as well.
    for key, value in snapshot.adapters["text_encoder"].items():
        np.testing.assert_array_equal(value, average.adapters["text_encoder"][key])
    assert isinstance(trajectory, Trajectory)


@pytest.mark.long
def test_a_learner_that_died_before_the_first_update_begins_there_too(adapter: Path) -> None:
    begin, config = read_adapter(adapter), _config()
    one, other, rollout = LearnerActor(config), LearnerActor(config), RolloutActor(config)
    _, *learned = one.initialize([], [_ref(begin, "A")])
    trajectory = rollout.sample(UNIT, [_ref(learned[0], "first")])[1]
    task = UpdateTask(
        version=0,
        trajectories=[_ref(trajectory, "t")],
        advantages=np.array([1.0, -1.0]),
        mask=np.ones(2, dtype=bool),
        learned=[_ref(part, str(index)) for index, part in enumerate(learned)],
    )
    _, expected, *_ = one.update(task)
    _, found, *_ = other.update(task)  # a new process, never initialised
    for key, value in expected.adapters["text_encoder"].items():
        np.testing.assert_array_equal(value, found.adapters["text_encoder"][key])


def test_another_alpha_is_the_same_update(adapter: Path) -> None:
    begin = read_adapter(adapter)
    learner = LearnerActor(_config(text_encoder={"rank": 4, "alpha": 8.0}))
    learner.initialize([], [_ref(begin, "A")])
    found = learner.learner.learned().snapshot
    assert found.shapes["text_encoder"].alpha == 8
    for key, value in begin.adapters["text_encoder"].items():
        scale = 0.5 if key.endswith("lora_B.weight") else 1.0
        np.testing.assert_allclose(found.adapters["text_encoder"][key], value * scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"text_encoder": {"rank": 8}}, r"of the text_encoder has rank 4, the policy rank 8"),
        (
            {"text_encoder": {"rank": 4, "target_modules": ["q_proj"]}},
            r"the adapter of the text_encoder has other",
        ),
        ({"denoiser": {}}, r"the adapter is on text_encoder, the policy on text_encoder, u"),
        ({"text_encoder": None, "denoiser": {}}, r"the adapter is on text_encoder, the"),
    ],
)
def test_other_shapes_are_refused(adapter: Path, lora: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.init: .*{match}"):
        LearnerActor(_config(**lora)).initialize([], [_ref(read_adapter(adapter), "A")])


def test_other_sizes_are_refused(randomize: Callable[..., None]) -> None:
    learner = LearnerActor(_config())
    own = learner.learner.learned().snapshot
    tensors = {k: np.zeros((*v.shape[:1], 5), np.float32) for k, v in
               own.adapters["text_encoder"].items()}  # fmt: skip
    shapes = {"text_encoder": LoraShape(4, 4.0, ("q_proj",))}
    with pytest.raises(ConfigError, match=r"lora\.init: adapter tensor .* another model"):
        learner.initialize([], [_ref(PolicySnapshot(0, shapes, {"text_encoder": tensors}), "x")])


def test_an_adapter_that_is_not_there_is_named_before_anything_starts(tmp_path: Path) -> None:
    config = _config(init=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"lora\.init: .*nowhere"):
        check_inputs(config)
    check_inputs(config, new=False)  # a resumed run has it in its checkpoints
