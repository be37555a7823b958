"""The update's gradient is that of plain autograd, exactly; so is the KL penalty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.unit.learners import (
    ADVANTAGES,
    CPU,
    EVERYONE,
    PROMPTS,
    STEPS,
    batch_of,
    configured,
    sample,
)
from texforce_ray.diffusion.denoiser import draw_noise
from texforce_ray.diffusion.process import Process
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.likelihood import Pairs
from texforce_ray.rl.ppo_anchor import Anchor, sampled_means
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.ppo_totals import Totals, mean_metrics
from texforce_ray.rl.sharding import UpdateBatch

Load = Callable[[], Backbone]
Randomize = Callable[..., None]


def _to_double(learner: PpoLearner) -> PpoLearner:
    for module in (learner.backbone.text_encoder, learner.backbone.denoiser, learner.backbone.vae):
        module.double()
    learner.ema = [tensor.double() for tensor in learner.ema]
    return learner


@pytest.fixture
def trained(
    double: None, tiny_backbone: Load, randomize: Randomize
) -> Callable[..., tuple[PpoLearner, UpdateBatch]]:
    """A float64 learner some way from the policy that sampled its batch."""

    def make(**sections: Any) -> tuple[PpoLearner, UpdateBatch]:
        learner = _to_double(PpoLearner(tiny_backbone(), configured(**sections)))
        randomize(learner.adapter, seed=1)
        trajectory = sample(learner)
        for parameter, base in zip(
            learner.parameters, [p.detach().clone() for p in learner.parameters], strict=True
        ):
            parameter.data = base * 1.05
        return learner, batch_of(trajectory)

    return make


def _anchor(batch: UpdateBatch) -> Anchor:
    return Anchor.of(batch.trajectory.log_probs)


def _gradient(learner: PpoLearner, batch: UpdateBatch, steps: np.ndarray) -> list[Tensor]:
    """What the learner hands to the optimizer for the whole batch, before clipping its norm."""
    captured: list[Tensor] = []
    clip = nn.utils.clip_grad_norm_

    def capture(parameters: list[nn.Parameter], limit: float) -> Tensor:
        captured.extend(p.grad.clone() for p in parameters)
        return clip(parameters, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", capture)
        totals = [Totals(CPU) for _ in range(learner.config.learner.gradient_shards)]
        rows = np.arange(len(PROMPTS))
        gradient = learner._minibatch_gradient(batch, rows, steps, _anchor(batch), totals)
        learner._apply(gradient)
    return captured


def _plain_autograd(learner: PpoLearner, batch: UpdateBatch, steps: np.ndarray) -> list[Tensor]:
    """The same loss with every sample and step in one graph from tokens to log-probability."""
    backbone, process = learner.backbone, learner.process
    g = learner.config.diffusion.guidance_scale
    trajectory = batch.trajectory
    losses = []
    for row in np.flatnonzero(batch.mask):
        prompt = backbone.tokenize([trajectory.prompts[row]]).ids
        for index in steps[row]:
            x = torch.from_numpy(trajectory.latents[[row], index]).double()
            x_prev = torch.from_numpy(trajectory.latents[[row], index + 1]).double()
            step = torch.tensor([index])
            output = backbone.predict(x, process.timesteps[step], backbone.encode(prompt))
            if g > 1:
                empty = backbone.encode(backbone.tokenize([""]).ids)
                base = backbone.predict(x, process.timesteps[step], empty)
                output = base + g * (output - base)
            mean = process.mean(step, x, output)
            log_prob = process.log_prob(step, x_prev, mean)
            losses.append(_loss(learner, batch, row, index, mean, log_prob))
    return list(torch.autograd.grad(torch.cat(losses).mean(), learner.parameters))


def _loss(
    learner: PpoLearner, batch: UpdateBatch, row: int, index: int, mean: Tensor, log_prob: Tensor
) -> Tensor:
    """As the papers write it, with the mean of the policy that sampled from its noise."""
    objective, process, trajectory = learner.config.ppo, learner.process, batch.trajectory
    advantage, sigma = batch.advantages[row], float(process.sigma[index])
    _, drawn = draw_noise(learner.backbone, trajectory.seeds[[row]], learner.process)
    noise = drawn[index].double()
    old = torch.from_numpy(trajectory.latents[[row], index + 1]).double() - sigma * noise
    divergence = ((mean - old) ** 2 / (2 * sigma**2)).mean()
    log_ratio = log_prob - float(trajectory.log_probs[row, index])
    weight = 1.0
    if objective.level == "guard":
        log_ratio = (log_ratio + divergence) * sigma
        slopes = [_slope(process, step) for step in process.trainable]
        weight = np.mean([1 / slope for slope in slopes]) ** -1 / _slope(process, index)
    elif objective.level == "tempflow":
        weight = sigma / float(process.sigma[process.trainable].mean())
    ratio = log_ratio.exp()
    if objective.trust == "kl_mask":
        gone = divergence.item() >= objective.trust_kl and log_ratio.item() * advantage > 0
        return -weight * ratio * advantage * (not gone)
    limited = ratio.clamp(1 - objective.clip_range, 1 + objective.clip_range)
    return -weight * torch.minimum(ratio * advantage, limited * advantage)


def _slope(process: Process, index: int) -> float:
    """What a step makes of a change of the network's output."""
    step, zero = torch.tensor([index]), torch.zeros(1, 1, 1, 1)
    return abs(float(process.mean(step, zero, zero + 1) - process.mean(step, zero, zero)))


ALL_STEPS = np.tile(np.arange(STEPS), (4, 1))
SOME_STEPS = np.array([[0, 2], [1, 3], [2, 3], [0, 1]])


def _assert_close(ours: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    assert sum(float(t.square().sum()) for t in expected) > 0
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


@pytest.mark.parametrize("guidance_scale", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_is_that_of_plain_autograd(
    trained: Callable, guidance_scale: float, masked: bool
) -> None:
    learner, batch = trained(diffusion={"guidance_scale": guidance_scale})
    if masked:
        batch = batch_of(batch.trajectory, np.array([True, False, True, True]))
    expected = _plain_autograd(learner, batch, SOME_STEPS)
    _assert_close(_gradient(learner, batch, SOME_STEPS), expected, 1e-6)


@pytest.mark.parametrize("trust", ["clip", "kl_mask"])
@pytest.mark.parametrize("level", ["none", "guard", "tempflow"])
def test_levels_and_trust_regions_are_the_papers(trained: Callable, level: str, trust: str) -> None:
    bounds = {"clip_range": 3e-4 if level == "guard" else 2e-3, "trust_kl": 2e-5}
    variant = {"level": level, "trust": trust, "timestep_fraction": 1.0, **bounds}
    learner, batch = trained(objective=variant)
    totals = Totals(CPU)
    pairs = Pairs.of(np.arange(4), ALL_STEPS)
    learner._shard_gradient(batch, pairs, _anchor(batch), 16, totals)
    assert 0 < mean_metrics(np.array([totals.row()]))["ppo/clipfrac"] < 1
    expected = _plain_autograd(learner, batch, ALL_STEPS)
    # float32 noise: the old means are exact only to its precision.
    _assert_close(_gradient(learner, batch, ALL_STEPS), expected, 1e-4)


@pytest.mark.parametrize("level", ["guard", "tempflow"])
def test_levelled_steps_weigh_one_on_average_over_those_that_may_be_trained(
    tiny_backbone: Load, level: str
) -> None:
    objective = {"level": level, "timestep_choice": "first", "timestep_fraction": 0.5}
    learner = PpoLearner(tiny_backbone(), configured(objective=objective))
    assert learner.level is not None
    assert float(learner.level[:2].mean()) == pytest.approx(1.0)
    assert len(set(learner.level.tolist())) == STEPS


def test_the_samplers_means_follow_from_samples_and_their_noise(tiny_backbone: Load) -> None:
    """So trajectories need not store them."""
    learner = PpoLearner(tiny_backbone(), configured())
    trajectory, pairs = sample(learner), Pairs.of(np.arange(4), ALL_STEPS)
    kept: dict[tuple[int, int], Tensor] = {}
    learner.likelihood.log_probs(trajectory, pairs, means=kept)
    found = sampled_means(learner.likelihood, trajectory, pairs)
    again = torch.stack([kept[pair] for pair in zip(pairs.sample, pairs.step, strict=True)])
    torch.testing.assert_close(found, again, atol=2e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("variant", [{"level": "guard"}, {"trust": "kl_mask"}])
def test_decoupled_variants_measure_from_the_proximal_policy(
    tiny_backbone: Load, variant: dict[str, str]
) -> None:
    """In half precision stored latents are rounded, and means cannot follow from them."""
    learner = PpoLearner(tiny_backbone(), configured(objective={"decoupled": "always", **variant}))
    metrics = learner.update(batch_of(sample(learner)))
    assert metrics["ppo/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["learner/grad_norm"] > 0


@pytest.mark.long
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("text_encoder", [True, False], ids=["joint", "unet"])
def test_gradient_with_a_unet_adapter_is_that_of_plain_autograd(
    trained: Callable, guidance_scale: float, text_encoder: bool
) -> None:
    lora: dict[str, Any] = {"denoiser": {"rank": 2, "target_modules": ["to_q", "to_v"]}}
    if not text_encoder:
        lora["text_encoder"] = None
    learner, batch = trained(lora=lora, diffusion={"guidance_scale": guidance_scale})
    expected = _plain_autograd(learner, batch, SOME_STEPS)
    _assert_close(_gradient(learner, batch, SOME_STEPS), expected, 1e-6)


def test_that_comparison_has_pairs_with_and_without_gradient(trained: Callable) -> None:
    learner, batch = trained()
    pairs = Pairs.of(np.arange(4), SOME_STEPS)
    stored = _anchor(batch).log_probs[pairs.sample, pairs.step]
    ratio = (learner.likelihood.log_probs(batch.trajectory, pairs) - stored).exp()
    beyond = (ratio - 1) * torch.from_numpy(ADVANTAGES[pairs.sample]).sign()
    ended = beyond > learner.config.ppo.clip_range
    assert 0 < int(ended.sum()) < len(ended)


@pytest.mark.long
@pytest.mark.parametrize("learner_section", [{"microbatch_size": 1}, {"microbatch_size": 64}])
def test_microbatches_do_not_change_the_gradient(
    trained: Callable, learner_section: dict[str, int]
) -> None:
    expected = _gradient(*trained(learner={"microbatch_size": 5}), ALL_STEPS)
    ours = _gradient(*trained(learner=learner_section), ALL_STEPS)
    _assert_close(ours, expected, 1e-9)


@pytest.mark.long
@pytest.mark.parametrize("shards", [2, 4])
def test_gradient_shards_do_not_change_the_gradient(trained: Callable, shards: int) -> None:
    mask = np.array([True, True, False, True])

    def gradient(count: int) -> list[Tensor]:
        learner, batch = trained(learner={"gradient_shards": count})
        return _gradient(learner, batch_of(batch.trajectory, mask), ALL_STEPS)

    _assert_close(gradient(shards), gradient(1), 1e-9)


@pytest.mark.long
def test_decoupled_weights_reach_the_gradient(trained: Callable) -> None:
    learner, batch = trained(objective={"decoupled": "always", "behaviour_cap": 1.001})
    steps = ALL_STEPS
    anchor, error = learner._proximal(batch, steps, _anchor(batch).log_probs)
    assert error > 1e-4
    pairs = Pairs.of(np.arange(4), steps)
    current = learner.likelihood.log_probs(batch.trajectory, pairs).reshape(4, STEPS)
    torch.testing.assert_close(anchor.log_probs, current, rtol=1e-12, atol=0)
    expected = (current - _anchor(batch).log_probs).exp().clamp(max=1.001)
    weight = anchor.weight
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)
    assert (weight == 1.001).any()
    assert (weight < 1.001).any()
    # At the proximal policy the ratio is 1: the gradient is that of -w A log pi.
    ours = learner._shard_gradient(batch, pairs, anchor, len(pairs), Totals(CPU))
    scaled = replace(batch, advantages=np.ones(4))
    by_weight = torch.from_numpy(ADVANTAGES)[:, None] * weight
    weighted = Anchor(anchor.log_probs, by_weight)
    expected = learner._shard_gradient(scaled, pairs, weighted, len(pairs), Totals(CPU))
    _assert_close(ours, expected, 1e-9)


@pytest.mark.long
def test_kl_is_zero_at_the_base_and_pulls_towards_it(
    tiny_backbone: Load, randomize: Randomize
) -> None:
    config = configured(
        objective={"kl_weight": 1.0, "timestep_fraction": 1.0}, update={"minibatches": 4}
    )
    learner = PpoLearner(tiny_backbone(), config)
    steps = np.tile(np.arange(STEPS), (4, 1))
    indifferent = UpdateBatch(sample(learner), np.zeros(4), EVERYONE)
    assert all(float(g.abs().max()) == 0 for g in _gradient(learner, indifferent, steps))
    randomize(learner.adapter, seed=1)
    batch = UpdateBatch(sample(learner), np.zeros(4), EVERYONE)
    first = learner.update(batch)["ppo/kl_base"]
    again = replace(batch, trajectory=sample(learner))
    assert 0 < learner.update(again)["ppo/kl_base"] < first


@pytest.mark.long
def test_kl_equals_the_divergence_of_the_two_policies(trained: Callable) -> None:
    learner, batch = trained(objective={"kl_weight": 0.5, "clip_range": 0.9})
    pairs, totals = Pairs.of(np.arange(4), ALL_STEPS), Totals(CPU)
    learner._shard_gradient(batch, pairs, _anchor(batch), len(pairs), totals)

    def means() -> Tensor:
        conditioning, prompt = learner.likelihood.encode(batch.trajectory, np.arange(4))
        prepared = learner.backbone.prepare(conditioning)
        return learner.likelihood.mean(batch.trajectory, pairs, prepared, prompt[pairs.sample])[0]

    with torch.no_grad():
        tuned = means()
        with learner.adapter.disabled():
            base = means()
    sigma = learner.process.sigma[torch.from_numpy(pairs.step)].double()[:, None, None, None]
    expected = ((tuned - base) ** 2 / (2 * sigma**2)).mean(dim=(1, 2, 3)).sum()
    assert totals.row()[-1] == pytest.approx(float(expected), rel=1e-9)
