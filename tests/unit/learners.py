"""A learner on the miniature, the samples of its policy, and what the tests of it compare."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.sharding import UpdateBatch

PROMPTS = ["a green circle", "two red squares", "a green circle", "a blue square"]
SEEDS = np.array([3, 1, 4, 2**61])
ADVANTAGES = np.array([1.0, -0.5, 0.7, -2.0])
EVERYONE = np.ones(4, dtype=bool)
STEPS = 4
CPU = torch.device("cpu")


def configured(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "iterations": 2,
        "lora": {"text_encoder": {"rank": 2, "alpha": 2.0, "target_modules": ["q_proj", "v_proj"]}},
        "diffusion": {"steps": STEPS, "guidance_scale": 3.0},
        "prompts": {"per_iteration": 4, "samples_per_prompt": 1},
        "rollout": {"batch_size": 4},
        "objective": {"clip_range": 1e-4, "timestep_fraction": 0.75},
        "update": {"minibatches": 1},
        "learner": {"microbatch_size": 5},
    }
    for name, changes in sections.items():
        before = {} if "kind" in changes else values.get(name, {})
        values[name] = before | changes
    return make_config(values)


def sample(learner: PpoLearner) -> Trajectory:
    d = learner.config.diffusion
    sampler = Sampler(learner.backbone, steps=d.steps, eta=d.eta, guidance_scale=d.guidance_scale)
    return sampler.sample(PROMPTS, SEEDS, learner.version)[0]


def batch_of(trajectory: Trajectory, mask: np.ndarray = EVERYONE) -> UpdateBatch:
    return UpdateBatch(trajectory, np.where(mask, ADVANTAGES, 0.0), mask)


def weights_of(learner: PpoLearner) -> dict[str, np.ndarray]:
    return learner.learned().snapshot.adapters["text_encoder"]


def assert_equal_weights(one: PpoLearner, other: PpoLearner) -> None:
    for key, value in weights_of(one).items():
        np.testing.assert_array_equal(value, weights_of(other)[key], err_msg=key)
