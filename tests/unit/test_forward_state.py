"""Objectives on the forward process: what they store, restore, cost and report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.forward import FREE, KINDS, forward_config, sampled
from tests.unit.learners import PROMPTS, SEEDS, configured
from texforce_ray.config.io import make_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.flops import PassFlops
from texforce_ray.records.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from texforce_ray.rl import sizing
from texforce_ray.rl.forward_learner import ForwardLearner, Noised
from texforce_ray.rl.nft_learner import NftLearner
from texforce_ray.rl.objectives import make_learner
from texforce_ray.rl.sharding import UpdateBatch

Load = Callable[[], Backbone]
# ---- what is stored, and exact state -------------------------------------------------------------


def test_one_latent_of_each_sample_is_stored(tiny_backbone: Load) -> None:
    learner = make_learner(tiny_backbone(), forward_config("rwr"))
    assert isinstance(learner, ForwardLearner)
    assert sampled(learner).trajectory.latents.shape[:2] == (len(PROMPTS), 1)


def test_a_deterministic_solver_draws_the_stock_pipelines_images_and_no_likelihoods(
    tiny_backbone: Load, stock_pipeline: Callable, stock_images: Callable
) -> None:
    learner = make_learner(tiny_backbone(), forward_config("nft", diffusion={"eta": 0.0}))
    d = learner.config.diffusion
    sampler = Sampler(learner.backbone, steps=d.steps, eta=0.0, guidance_scale=d.guidance_scale)
    trajectory, images = sampler.sample(PROMPTS, SEEDS, 0)
    assert trajectory.log_probs.shape == (4, 0)
    stock = stock_images(
        stock_pipeline(), PROMPTS, SEEDS, steps=d.steps, eta=0.0, guidance_scale=3.0
    )
    assert np.abs(images.astype(int) - stock.astype(int)).max() <= 1


@pytest.mark.parametrize("average", [None, 0.9], ids=["", "ema"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_changes_nothing(
    kind: str, average: float | None, tiny_backbone: Load, tmp_path: Path
) -> None:
    """Through a checkpoint's files, after an update: the next one has the same bits."""
    config = forward_config(
        kind, optimizer={"ema_decay": average, "lr": 1e-2}, diffusion={"eta": 0.0}
    )
    whole, restored = (make_learner(tiny_backbone(), config) for _ in range(2))
    assert isinstance(whole, ForwardLearner)
    assert isinstance(restored, ForwardLearner)
    whole.update(sampled(whole))
    learned = whole.learned()
    checkpoint = Checkpoint(learned.state, (learned.snapshot,), learned.average)
    restored.load(load_checkpoint(save_checkpoint(tmp_path, checkpoint)).learned)
    for learner in (whole, restored):
        assert learner.update(sampled(learner))["forward/error"] > 0
    one, other = whole.learned(), restored.learned()
    assert one.state.version == other.state.version == 2
    for ours, theirs in ((one.snapshot, other.snapshot), (one.average, other.average)):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            for key, value in ours.adapters["text_encoder"].items():
                np.testing.assert_array_equal(theirs.adapters["text_encoder"][key], value)
    for key, value in one.state.own.items():
        np.testing.assert_array_equal(other.state.own[key], value, err_msg=key)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_microbatches_and_shards_change_nothing_but_rounding(
    kind: str, tiny_backbone: Load
) -> None:
    plain = make_learner(tiny_backbone(), forward_config(kind))
    assert isinstance(plain, ForwardLearner)
    batch = sampled(plain)
    metrics = plain.update(batch)
    assert metrics["forward/trained_pairs"] == 8
    cut = make_learner(
        tiny_backbone(), forward_config(kind, learner={"microbatch_size": 1, "gradient_shards": 2})
    )
    cut.update(batch)
    for one, other in zip(plain.parameters, cut.parameters, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_nft_samples_with_the_old_policy_and_exports_the_trained_one(tiny_backbone: Load) -> None:
    objective = {"old_rate": 0.25, "old_decay_max": 0.4, "old_start": 1}
    learner = make_learner(
        tiny_backbone(),
        forward_config("nft", objective=objective, optimizer={"schedule": "constant"}),
    )
    assert isinstance(learner, NftLearner)

    def numbers() -> tuple[np.ndarray, np.ndarray]:
        learned = learner.learned()
        assert learned.average is not None
        pair = (s.adapters["text_encoder"] for s in (learned.snapshot, learned.average))
        old, trained = (np.concatenate([v.ravel() for v in a.values()]) for a in pair)
        return old, trained

    before, _ = numbers()
    for decay in (0.0, 0.25, 0.4):
        assert learner.update(sampled(learner))["forward/old_decay"] == decay
        old, trained = numbers()
        assert (trained != before).any()
        np.testing.assert_allclose(old, decay * before + (1 - decay) * trained, atol=1e-7)
        np.testing.assert_array_equal(
            old, np.concatenate([p.detach().numpy().ravel() for p in _in_order(learner)])
        )
        before = old


def _in_order(learner: ForwardLearner) -> list[Tensor]:
    """The adapter's tensors as it is between updates, in a snapshot's order."""
    return list(learner.adapter.parts["text_encoder"].weights().values())


def test_nft_begins_with_both_policies_at_the_given_adapter(
    tiny_backbone: Load, randomize: Callable[..., None]
) -> None:
    first, second = (make_learner(tiny_backbone(), forward_config("nft")) for _ in range(2))
    randomize(first.adapter, seed=3)
    second.begin_from(first.adapter.snapshot(0))
    assert isinstance(second, NftLearner)
    for trained, now, given in zip(
        second.trained, second.parameters, first.parameters, strict=True
    ):
        assert torch.equal(trained, now)
        assert torch.equal(now, given)


# ---- an objective of one's own, costs and what is reported ---------------------------------------


class Constant(ForwardLearner):
    """The plain denoising loss, times a setting of its own."""

    def pair_loss(self, batch: UpdateBatch, kept: np.ndarray) -> Callable[[Noised, Tensor], Tensor]:
        del batch, kept
        objective: Any = self.config.objective
        return lambda noised, output: objective.kwargs["factor"] * noised.error(output)


def test_a_forward_objective_of_ones_own_needs_its_loss_alone(tiny_backbone: Load) -> None:
    given = {"levels": 3, "anchor_weight": 0.5, "factor": 2.0}
    target = f"{Constant.__module__}:{Constant.__name__}"
    objective = {"kind": "custom", "target": target, "kwargs": given}
    learner = make_learner(tiny_backbone(), configured(objective=objective))
    assert isinstance(learner, Constant)
    metrics = learner.update(sampled(learner))
    assert metrics["forward/trained_pairs"] == 3 * len(PROMPTS)
    assert metrics["forward/loss"] == pytest.approx(2 * metrics["forward/error"])
    assert "forward/anchor" in metrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 0}, "objective.kwargs.levels: Input should be greater than or equal to 1"),
        ({"anchor_weight": -1}, "objective.kwargs.anchor_weight"),
        ({"embedding_anchor_weight": 0.1}, "no text encoder is trained"),
    ],
)
def test_its_wrong_settings_are_named(
    settings: dict[str, float], message: str, tiny_backbone: Load
) -> None:
    target = f"{Constant.__module__}:{Constant.__name__}"
    objective = {"kind": "custom", "target": target, "kwargs": {"factor": 1.0, **settings}}
    config = configured(objective=objective).model_dump()
    config["lora"] = {"text_encoder": None, "denoiser": {"rank": 2}}
    with pytest.raises(ConfigError, match=message):
        make_learner(tiny_backbone(), make_config(config))


def test_minibatches_without_a_best_sample_take_no_step(tiny_backbone: Load) -> None:
    """Otherwise momentum and decay would move the weights without a gradient."""
    config = forward_config("raft", objective={"best": 1, **FREE}, update={"minibatches": 4})
    learner = make_learner(tiny_backbone(), config)
    learner.update(sampled(learner))  # type: ignore[arg-type]
    assert learner.updates == 4
    steps = {float(learner.optimizer.state[p]["step"]) for p in learner.parameters}
    assert steps == {1.0}


def test_raft_does_not_compute_samples_that_do_not_count(tiny_backbone: Load) -> None:
    free = make_learner(tiny_backbone(), forward_config("raft", objective={"best": 1, **FREE}))
    assert free.update(sampled(free))["forward/trained_pairs"] == 2
    held = make_learner(tiny_backbone(), forward_config("raft", objective={"best": 1}))
    assert held.update(sampled(held))["forward/trained_pairs"] == 8  # the anchors hold all


def test_awm_reports_how_far_its_policy_has_moved(tiny_backbone: Load) -> None:
    sections = {"update": {"epochs": 3, "minibatches": 2}, "optimizer": {"lr": 0.03}}
    learner = make_learner(
        tiny_backbone(), forward_config("awm", objective={"clip_range": 1e-4}, **sections)
    )
    metrics = learner.update(sampled(learner))
    assert 0 < metrics["forward/clipfrac"] < 1
    assert 0.5 < metrics["forward/ratio"] < 2
    assert metrics["forward/ratio"] != 1


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_passes_that_were_made(
    kind: str, tiny_backbone: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(tiny_backbone(), forward_config(kind, update={"epochs": 2}))
    assert isinstance(learner, ForwardLearner)
    batch, seen = sampled(learner), {True: 0, False: 0}
    predict = learner.backbone.predict_prepared

    def counted(x: Tensor, *given: Any) -> Tensor:
        seen[torch.is_grad_enabled()] += len(x)
        return predict(x, *given)

    monkeypatch.setattr(learner.backbone, "predict_prepared", counted)
    metrics = learner.update(batch)
    assert learner.update_flops(metrics, PassFlops(1.0, 2.0, 0.0)) == 3 * seen[True] + seen[False]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_sizes_are_measured_whatever_the_minibatch(kind: str, tiny_backbone: Load) -> None:
    grouped = {
        "prompts": {"per_iteration": 2, "samples_per_prompt": 4},
        "rollout": {"batch_size": 8},
    }
    config = forward_config(kind, update={"minibatches": 4}, **grouped)
    work, most = sizing.update(tiny_backbone(), config)
    assert most == 2 * 2  # two samples in a minibatch, two levels each
    work(3)
