"""What is stored of a trajectory is what the learner reads, and little more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.direct_learner import DirectLearner
from texforce_ray.rl.learner import Learner
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.sharding import UpdateBatch

PROMPTS = ["a green circle", "two red squares"] * 2
SEEDS = np.arange(4)


def _config(**objective: Any) -> Config:
    return make_config(
        {
            "iterations": 3,
            "diffusion": {"steps": 8, "guidance_scale": 1.0},
            "prompts": {"per_iteration": 2, "samples_per_prompt": 2},
            "rollout": {"batch_size": 2},
            "rewards": [{"name": "shapes_scorer"}],
            "objective": objective,
            "update": {"minibatches": 2},
        }
    )


def _redness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    del prompts
    return images[:, 0].mean(dim=(1, 2))


@pytest.mark.long
@pytest.mark.parametrize(
    ("objective", "stored"),
    [
        ({"timestep_choice": "first"}, 5),
        ({"timestep_choice": "random"}, 8),
        ({"decoupled": "always", "kl_weight": 0.1, "timestep_choice": "first"}, 5),
        ({"kind": "direct", "method": "refl", "steps": 2}, 2),
        ({"kind": "direct", "method": "draft", "steps": 3}, 3),
        ({"kind": "direct", "method": "alignprop", "steps": 3}, 3),
    ],
)
def test_an_update_on_what_is_kept_is_the_update_on_everything(
    tiny_backbone: Callable[[], Backbone], objective: dict[str, Any], stored: int
) -> None:
    config, backbones = _config(**objective), [tiny_backbone(), tiny_backbone()]
    results = []
    for backbone, everything in zip(backbones, (True, False), strict=True):
        learner: Learner
        if config.direct is None:
            learner = PpoLearner(backbone, config)
        else:
            learner = DirectLearner(backbone, config, _redness)
        sampler = Sampler(backbone, steps=8, eta=1.0, guidance_scale=1.0)
        for iteration in range(2):
            # As two rollout actors would.
            keep = [
                type(learner).kept_latents(config, learner.process, iteration, f, 2) for f in (0, 2)
            ]
            kept = None if everything else np.concatenate(keep)
            trajectory, _ = sampler.sample(PROMPTS, SEEDS + iteration, iteration, kept)
            if not everything:
                assert trajectory.latents.shape[1] <= stored
            batch = UpdateBatch(trajectory, np.array([1.0, -0.5, 0.7, -1.0]), np.ones(4, bool))
            metrics = learner.update(batch)
        results.append((metrics, learner.learned().snapshot.adapters))
    assert results[0][0] == results[1][0]
    for part, tensors in results[0][1].items():
        for key, value in tensors.items():
            np.testing.assert_array_equal(value, results[1][1][part][key], err_msg=key)
