"""What an update does: likelihoods that agree with the sampler's, and nothing else touched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.learners import (
    ADVANTAGES,
    assert_equal_weights,
    batch_of,
    configured,
    sample,
    weights_of,
)
from texforce_ray.errors import NumericsError
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.sharding import UpdateBatch

Load = Callable[[], Backbone]
Randomize = Callable[..., None]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_learner_and_sampler_agree_in_float32(
    tiny_backbone: Load, randomize: Randomize, guidance_scale: float
) -> None:
    learner = PpoLearner(tiny_backbone(), configured(diffusion={"guidance_scale": guidance_scale}))
    randomize(learner.adapter, seed=1)
    metrics = learner.update(batch_of(sample(learner)))
    assert 0 <= metrics["ppo/ratio_error_first_pass"] <= 1e-5
    assert metrics["ppo/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["ppo/trained_pairs"] == 4 * 3


def test_stale_samples_are_checked_against_the_policy_that_drew_them(
    tiny_backbone: Load, randomize: Randomize
) -> None:
    learner = PpoLearner(tiny_backbone(), configured(objective={"decoupled": "always"}))
    randomize(learner.adapter, seed=1)
    behaviour, batch = learner.learned().snapshot, batch_of(sample(learner))
    randomize(learner.adapter, seed=2)
    current = weights_of(learner)
    with pytest.raises(NumericsError, match=r"at most 1e-04 is allowed.*max_ratio_error"):
        learner.update(batch)
    assert learner.version == learner.updates == 0
    metrics = learner.update(batch, behaviour)
    assert metrics["ppo/ratio_error_first_pass"] <= 1e-5
    largest = 1.01 * learner.config.optimizer.lr
    for key, value in weights_of(learner).items():
        assert 0 < np.abs(value - current[key]).max() < largest, key


def test_masked_sample_has_no_influence(tiny_backbone: Load) -> None:
    mask = np.array([True, True, False, True])
    config = configured(objective={"max_ratio_error": 1e9}, update={"minibatches": 1})

    def updated(noise: float) -> PpoLearner:
        learner = PpoLearner(tiny_backbone(), config)
        trajectory = sample(learner)
        latents = trajectory.latents.copy()
        latents[2] += noise
        advantages = ADVANTAGES + np.where(mask, 0, 10 * noise)
        learner.update(UpdateBatch(replace(trajectory, latents=latents), advantages, mask))
        return learner

    assert_equal_weights(updated(0.0), updated(0.5))


def test_wholly_masked_minibatch_is_survived(tiny_backbone: Load) -> None:
    learner = PpoLearner(tiny_backbone(), configured())
    metrics = learner.update(batch_of(sample(learner), np.zeros(4, dtype=bool)))
    assert metrics["ppo/trained_pairs"] == 0
    assert metrics["learner/grad_norm"] == 0
    assert all(np.isfinite(value).all() for value in weights_of(learner).values())


def test_frozen_parts_stay_frozen(tiny_backbone: Load) -> None:
    learner = PpoLearner(tiny_backbone(), configured())
    before, adapter = _frozen_digest(learner.backbone), weights_of(learner)
    learner.update(batch_of(sample(learner)))
    assert _frozen_digest(learner.backbone) == before
    assert all((weights_of(learner)[key] != value).any() for key, value in _lora_b(adapter))


def _lora_b(weights: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    return [(key, value) for key, value in weights.items() if "lora_B" in key]


def _frozen_digest(backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for module in (backbone.denoiser, backbone.vae, backbone.text_encoder):
        for name, tensor in module.state_dict().items():
            if "lora_" not in name:
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
