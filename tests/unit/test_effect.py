"""Every rollout actor samples with the policy that was published, and it changes something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.references import Ref
from texforce_ray.actors.learner import LearnerActor
from texforce_ray.actors.messages import SampleInfo, Updated, WorkUnit
from texforce_ray.actors.rollout import RolloutActor
from texforce_ray.artifacts.snapshot import Effect, PolicySnapshot
from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.driver.collect import check_effect
from texforce_ray.errors import EffectError
from texforce_ray.model.effect import digest

pytestmark = pytest.mark.usefixtures("no_cluster")

Randomize = Callable[..., None]


def _config(**sections: Any) -> Config:
    return make_config(
        {
            "diffusion": {"steps": 2, "guidance_scale": 1.0},
            "prompts": {"per_iteration": 1, "samples_per_prompt": 2},
            "rollout": {"batch_size": 2},
            "lora": {"text_encoder": {"rank": 4, "alpha": 4.0}},
            "update": {"minibatches": 1},
            "advantage": {"mode": "batch"},
        }
        | sections
    )


UNIT = WorkUnit(0, 0, ("a green circle",) * 2, ({}, {}), np.array([1, 2]), 1)


def _published(actor: LearnerActor, randomize: Randomize) -> tuple[Effect, PolicySnapshot]:
    randomize(actor.learner.adapter, seed=3, scale=0.1)
    updated, learned = actor._published(Updated({}))
    effect = updated.effect
    assert effect is not None
    assert updated.metrics["learner/effect"] == effect.change + effect.denoiser
    return effect, learned.snapshot


def _sampled(actor: RolloutActor, snapshot: PolicySnapshot, name: str = "a") -> SampleInfo:
    return actor.sample(UNIT, [Ref(snapshot, name)])[0]  # type: ignore[list-item]


@pytest.mark.long
@pytest.mark.parametrize(
    "lora",
    [
        {"text_encoder": {"rank": 4, "alpha": 4.0}},
        {"text_encoder": None, "denoiser": {"rank": 2}},
        {"text_encoder": None, "denoiser": {"rank": 2, "target_modules": ["conv1", "to_q"]}},
    ],
    ids=["text", "unet", "conv"],
)
def test_an_actor_that_holds_the_policy_measures_what_the_learner_did(
    randomize: Randomize, lora: dict[str, Any]
) -> None:
    config = _config(lora=lora)
    effect, snapshot = _published(LearnerActor(config), randomize)
    info = _sampled(RolloutActor(config), snapshot)
    assert info.effect == effect
    assert effect.change + effect.denoiser > 0.001
    check_effect(info, effect, 1, ["float32"])


@pytest.mark.long
def test_an_actor_that_never_got_the_policy_is_named(randomize: Randomize) -> None:
    effect, snapshot = _published(LearnerActor(_config()), randomize)

    class Deaf(RolloutActor):
        def _load(self, snapshot: PolicySnapshot) -> None:
            """The adapter never reaches it."""

    with pytest.raises(EffectError, match=r"cpu, pid \d+ on .* version 1: .*digest 0, .*learner"):
        check_effect(_sampled(Deaf(_config()), snapshot), effect, 1, ["float32"])


def test_an_actor_that_keeps_an_older_policy_is_named(randomize: Randomize) -> None:
    learner, actor = LearnerActor(_config()), RolloutActor(_config())
    _, old = _published(learner, randomize)
    _sampled(actor, old)
    randomize(learner.learner.adapter, seed=4, scale=0.1)
    updated, _ = learner._published(Updated({}))
    with pytest.raises(EffectError, match="does not hold the adapter of policy version 2"):
        check_effect(_sampled(actor, old), updated.effect, 2, ["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_is_bound_to_no_layer_there_is_found(
    randomize: Randomize, dtype: str
) -> None:
    config = _config(model={"dtype": dtype})
    effect, snapshot = _published(LearnerActor(config), randomize)

    class Unbound(RolloutActor):
        def _load(self, snapshot: PolicySnapshot) -> None:
            super()._load(snapshot)
            for layer in self._adapter.parts["text_encoder"]._layers:
                layer.enable_adapters(False)

    info = _sampled(Unbound(config), snapshot)
    assert info.effect is not None
    assert info.effect.digest == effect.digest
    with pytest.raises(
        EffectError,
        match=r"its effect differs: .* prompt's embedding is 0, at the",
    ):
        check_effect(info, effect, 1, [dtype])  # type: ignore[arg-type]


@pytest.mark.long
def test_each_part_is_looked_at_by_itself(randomize: Randomize) -> None:
    config = _config(lora={"text_encoder": {"rank": 4}, "denoiser": {"rank": 2}})
    effect, snapshot = _published(LearnerActor(config), randomize)

    class Half(RolloutActor):
        def _load(self, snapshot: PolicySnapshot) -> None:
            super()._load(snapshot)
            for layer in self._adapter.parts["unet"]._layers[first:]:
                layer.enable_adapters(False)

    first = 0
    with pytest.raises(EffectError, match="the U-Net's first adapted layer is 0, at the"):
        check_effect(_sampled(Half(config), snapshot), effect, 1, ["float32"])
    first = 4
    with pytest.raises(EffectError, match="number of layers with the adapter switched on"):
        check_effect(_sampled(Half(config), snapshot), effect, 1, ["float32"])


@pytest.mark.parametrize("kind", ["nft", "awm"])
def test_samples_of_another_dtype_are_of_the_same_policy(randomize: Randomize, kind: str) -> None:
    config = _config(objective={"kind": kind}, rollout={"batch_size": 2, "dtype": "bfloat16"})
    learner = LearnerActor(config)
    effect, snapshot = _published(learner, randomize)
    actor = RolloutActor(config)
    assert (actor.backbone.dtype, learner.learner.backbone.dtype) == (torch.bfloat16, torch.float32)
    info = _sampled(actor, snapshot)
    assert info.effect is not None
    assert info.effect.digest == effect.digest
    assert info.effect.change != effect.change, "a rounded embedding"
    check_effect(info, effect, 1, config.dtypes)


def test_the_base_model_has_no_effect_and_a_fresh_adapter_none_either() -> None:
    config = _config()
    actor = RolloutActor(config)
    actor.generate(["a green circle"], np.array([1]), [], 2.0)
    assert actor._effect == Effect(0, 0.0)
    updated, learned = LearnerActor(config)._published(Updated({}))
    assert updated.effect is not None
    assert updated.effect.change == 0
    assert _sampled(actor, learned.snapshot).effect == updated.effect


def test_training_that_changes_nothing_stops(randomize: Randomize) -> None:
    actor = LearnerActor(_config())
    for layer in actor.learner.adapter.parts["text_encoder"]._layers:
        layer.enable_adapters(False)
    randomize(actor.learner.adapter, seed=3)
    with pytest.raises(EffectError, match="training changes nothing"):
        actor._published(Updated({}))


def test_a_digest_sees_order_and_every_bit() -> None:
    one, other = torch.arange(6.0).reshape(2, 3), torch.zeros(4)
    parameters = [torch.nn.Parameter(one), torch.nn.Parameter(other)]
    before = digest(parameters)
    assert before == digest([torch.nn.Parameter(t.detach().clone()) for t in parameters])
    assert before != digest(parameters[::-1])
    changed = one.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    assert before != digest([torch.nn.Parameter(changed), parameters[1]])
    assert before != digest([torch.nn.Parameter(one), torch.nn.Parameter(torch.zeros(5))])
