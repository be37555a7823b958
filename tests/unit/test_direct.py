"""Direct backpropagation: the right images, the right gradient, and a reward that rises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from texforce_ray.config import Config, DirectObjective
from texforce_ray.config.io import make_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.direct_learner import DirectLearner, first_step
from texforce_ray.rl.sharding import UpdateBatch

PROMPTS = ["a green circle", "two red squares", "a green circle", "a blue square"]
SEEDS = np.array([3, 1, 4, 2**61])
STEPS = 4
Load = Callable[[], Backbone]


def _redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    assert len(images) == len(prompts)
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def _config(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "iterations": 4,
        "lora": {"text_encoder": None, "denoiser": {"rank": 2, "alpha": 2}},
        "diffusion": {"steps": STEPS, "guidance_scale": 3.0},
        "prompts": {"per_iteration": 4, "samples_per_prompt": 1},
        "rollout": {"batch_size": 4},
        "update": {"minibatches": 1},
        "optimizer": {"lr": 0.02, "warmup_fraction": 0.0, "schedule": "constant"},
        "learner": {"microbatch_size": 3},
        "objective": {"kind": "direct", "method": "draft", "steps": 2},
    }
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return make_config(values)


def _sample(learner: DirectLearner) -> tuple[Trajectory, np.ndarray]:
    d = learner.config.diffusion
    sampler = Sampler(learner.backbone, steps=d.steps, eta=d.eta, guidance_scale=d.guidance_scale)
    return sampler.sample(PROMPTS, SEEDS, learner.version)


def _batch(trajectory: Trajectory) -> UpdateBatch:
    return UpdateBatch(trajectory, np.zeros(4), np.ones(4, dtype=bool))


def _uint8(images: Tensor) -> np.ndarray:
    return images.detach().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("first", [0, 2])
def test_the_recomputed_images_are_the_sampled_ones(
    tiny_backbone: Load, randomize: Callable[..., None], first: int, checkpointing: bool
) -> None:
    config = _config(objective={"kind": "direct", "gradient_checkpointing": checkpointing})
    learner = DirectLearner(tiny_backbone(), config, _redness)
    randomize(learner.adapter, 1, scale=0.05)
    trajectory, images = _sample(learner)
    again = _uint8(learner.images(trajectory, np.array([2, 0]), first))
    assert np.abs(again.astype(int) - images[[2, 0]]).max() <= 1


@pytest.mark.long
@pytest.mark.parametrize("method", ["refl", "draft", "alignprop"])
@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_the_gradient_is_the_rewards(
    double: None, tiny_backbone: Load, randomize: Callable[..., None], method: str, part: str
) -> None:
    adapter = {"rank": 2, "alpha": 2.0, "target_modules": ["q_proj"]}
    lora = {"text_encoder": adapter} if part == "text_encoder" else {"text_encoder": None}
    config = _config(
        lora=lora | {"denoiser": None if part != "unet" else {}},
        objective={"kind": "direct", "method": method},
        optimizer={"max_grad_norm": 1e9},
    )
    learner = DirectLearner(tiny_backbone(), config, _redness)
    randomize(learner.adapter, 1, scale=0.1)
    trajectory, _ = _sample(learner)
    for module in (*learner.backbone.parts().values(), learner.backbone.vae):
        module.double()
    found, _ = learner._minibatch(_batch(trajectory), np.arange(4))
    first = first_step(learner.direct, STEPS, config.seed, 0)
    index = max(range(len(found)), key=lambda i: float(found[i].abs().max()))
    parameter, gradient = learner.parameters[index], found[index]
    place = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)

    def reward(offset: float) -> float:
        with torch.no_grad():
            parameter[place] += offset
            images = learner.images(trajectory, np.arange(4), first)
            parameter[place] -= offset
        return float(_redness(images, PROMPTS).mean())

    slope = (reward(1e-5) - reward(-1e-5)) / 2e-5
    assert -float(gradient[place]) == pytest.approx(slope, rel=1e-3)


@pytest.mark.long
def test_the_reward_rises_and_a_restored_learner_continues_exactly(tiny_backbone: Load) -> None:
    learner = DirectLearner(tiny_backbone(), _config(), _redness)
    state, rewards = None, []
    for _ in range(4):
        trajectory, _ = _sample(learner)
        if learner.version == 2:
            state = learner.learned()
        rewards.append(learner.update(_batch(trajectory))["direct/reward"])
    assert rewards[-1] > rewards[0] + 0.01, rewards

    assert state is not None
    other = DirectLearner(tiny_backbone(), _config(), _redness)
    other.load(state)
    for _ in range(2):
        other.update(_batch(_sample(other)[0]))
    for part, weights in learner.learned().snapshot.adapters.items():
        for key, value in weights.items():
            np.testing.assert_array_equal(value, other.learned().snapshot.adapters[part][key])


@pytest.mark.long
def test_masked_samples_play_no_part(tiny_backbone: Load) -> None:
    one, other = (DirectLearner(tiny_backbone(), _config(), _redness) for _ in range(2))
    trajectory, _ = _sample(one)
    mask = np.array([True, False, True, True])
    trajectory.latents[1] = 0.0 * trajectory.latents[1]
    one.update(UpdateBatch(trajectory, np.zeros(4), mask))
    trajectory.latents[1] += 1.0
    other.update(UpdateBatch(trajectory, np.zeros(4), mask))
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert torch.equal(a, b)


def test_where_the_gradient_starts() -> None:
    draft = DirectObjective(method="draft", steps=3)
    assert {first_step(draft, 10, 0, update) for update in range(20)} == {7}
    assert first_step(DirectObjective(method="draft", steps=99), 10, 0, 0) == 0
    drawn = {first_step(DirectObjective(method="refl", steps=3), 10, 0, u) for u in range(50)}
    assert drawn == {7, 8, 9}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"kl_weight": 0.1}}, "kl_weight"),
        ({"rewards": [{"name": "shapes_scorer", "min": 0.1}]}, "shapes_scorer has 'min'"),
        ({"rewards": [{"name": "shapes", "weight": 0}]}, "other than 0"),
    ],
)
def test_what_cannot_be_differentiated_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config({"objective": {"kind": "direct"} | sections.pop("objective", {})} | sections)


@pytest.mark.long
@pytest.mark.parametrize(
    ("direct", "size", "expected"),
    [
        ({"method": "draft", "steps": 2}, 4, [2, 2]),
        ({"method": "draft", "steps": 2}, 1, [1, 1, 1, 1]),
        ({"method": "refl", "steps": 2}, 3, [3, 1]),
    ],
)
def test_a_microbatch_counts_the_steps_with_gradient(
    tiny_backbone: Load, direct: dict[str, Any], size: int, expected: list[int]
) -> None:
    seen = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(len(images))
        return _redness(images, prompts)

    config = _config(objective={"kind": "direct"} | direct, learner={"microbatch_size": size})
    learner = DirectLearner(tiny_backbone(), config, reward)
    learner.update(_batch(_sample(learner)[0]))
    assert seen == expected
