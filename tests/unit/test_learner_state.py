"""A learner's state: restored with the same bits, a copy, averaged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.unit.learners import assert_equal_weights, batch_of, configured, sample, weights_of
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.ppo_learner import PpoLearner

Load = Callable[[], Backbone]
Randomize = Callable[..., None]


@pytest.mark.long
def test_joint_training_keeps_a_rate_for_each_part_and_resumes_from_its_state(
    tiny_backbone: Load,
) -> None:
    config = configured(lora={"denoiser": {"rank": 2, "lr": 1e-5}}, objective={"kl_weight": 0.01})
    one, other = PpoLearner(tiny_backbone(), config), PpoLearner(tiny_backbone(), config)
    batch = batch_of(sample(one))
    assert one.update(batch)["ppo/ratio_error_first_pass"] < 1e-5
    rates = [group["lr"] for group in one.optimizer.param_groups]
    assert rates[1] / rates[0] == pytest.approx(1e-5 / config.optimizer.lr)
    other.load(one.learned())
    again = batch_of(sample(one))
    one.update(again)
    other.update(again)
    for part in ("text_encoder", "unet"):
        ours = one.learned().snapshot.adapters[part]
        for key, value in other.learned().snapshot.adapters[part].items():
            np.testing.assert_array_equal(ours[key], value, err_msg=key)
        assert any(v.any() for k, v in ours.items() if "lora_B" in k)


@pytest.mark.long
def test_restored_learner_continues_with_the_same_bits(
    tiny_backbone: Load, randomize: Randomize
) -> None:
    config = configured(optimizer={"ema_decay": 0.9}, update={"minibatches": 2, "epochs": 2})
    whole = PpoLearner(tiny_backbone(), config)
    randomize(whole.adapter, seed=1)
    whole.update(batch_of(sample(whole)))
    learned = whole.learned()
    batch = batch_of(sample(whole))
    whole.update(batch)
    restored = PpoLearner(tiny_backbone(), config)
    restored.load(learned)
    np.testing.assert_array_equal(sample(restored).latents, batch.trajectory.latents)
    restored.update(batch)
    assert (restored.version, restored.updates) == (whole.version, whole.updates) == (2, 8)
    assert_equal_weights(whole, restored)
    for key, value in whole.learned().state.optimizer.items():
        np.testing.assert_array_equal(value, restored.learned().state.optimizer[key], err_msg=key)
    averaged = whole.learned().average.adapters["text_encoder"]
    for key, value in restored.learned().average.adapters["text_encoder"].items():
        np.testing.assert_array_equal(value, averaged[key], err_msg=key)


def test_state_is_a_copy(tiny_backbone: Load) -> None:
    learner = PpoLearner(tiny_backbone(), configured(optimizer={"ema_decay": 0.9}))
    learner.update(batch_of(sample(learner)))
    snapshot, state, average = learner.learned()
    adapters = (snapshot.adapters["text_encoder"], average.adapters["text_encoder"])
    arrays = {**state.optimizer, **{f"{i}/{k}": v for i in (0, 1) for k, v in adapters[i].items()}}
    before = {k: v.copy() for k, v in arrays.items()}
    learner.update(batch_of(sample(learner)))
    for key, value in arrays.items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


def test_reloading_the_start_undoes_an_update(tiny_backbone: Load) -> None:
    learner = PpoLearner(tiny_backbone(), configured())
    learned, batch = learner.learned(), batch_of(sample(learner))
    learner.update(batch)
    once = weights_of(learner)
    learner.load(learned)
    learner.update(batch)
    for key, value in weights_of(learner).items():
        np.testing.assert_array_equal(value, once[key], err_msg=key)


def test_average_follows_the_adapter_and_is_what_is_evaluated(tiny_backbone: Load) -> None:
    learner = PpoLearner(tiny_backbone(), configured(optimizer={"ema_decay": 0.75}))
    start = weights_of(learner)
    learner.update(batch_of(sample(learner)))
    now, _, averaged = learner.learned()
    assert averaged.version == now.version == 1
    for key, value in averaged.adapters["text_encoder"].items():
        live = now.adapters["text_encoder"][key]
        np.testing.assert_allclose(value, 0.75 * start[key] + 0.25 * live, rtol=1e-5, atol=1e-9)
        np.testing.assert_array_equal(live, weights_of(learner)[key])
    assert any(
        (value != now.adapters["text_encoder"][key]).any()
        for key, value in averaged.adapters["text_encoder"].items()
    )


def test_without_average_there_is_none(tiny_backbone: Load) -> None:
    learner = PpoLearner(tiny_backbone(), configured())
    learner.update(batch_of(sample(learner)))
    assert learner.learned().average is None
