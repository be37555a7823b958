"""Objectives on the forward process against plain, independent computations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tests.unit.forward import FREE, KINDS, forward_config, sampled
from tests.unit.learners import EVERYONE, STEPS
from texforce_ray.diffusion.ddim import PREDICTION_TYPES, Ddim
from texforce_ray.diffusion.process import Process
from texforce_ray.model.backbone import Backbone, load_backbone
from texforce_ray.model.conditioning import Conditioning
from texforce_ray.rl.awm_learner import AwmLearner
from texforce_ray.rl.forward import best_weights, exponential_weights
from texforce_ray.rl.forward_learner import ForwardLearner, Noised, mean_square
from texforce_ray.rl.nft_learner import NftLearner
from texforce_ray.rl.objectives import make_learner
from texforce_ray.rl.sharding import UpdateBatch

Load = Callable[[], Backbone]
# ---- weights -------------------------------------------------------------------------------------


def test_exponential_weights_are_those_of_a_softmax_over_each_prompts_samples() -> None:
    rng = np.random.default_rng(0)
    advantages, mask = rng.normal(size=12), rng.random(12) < 0.7
    weights = exponential_weights(advantages, mask, 4, 0.5)
    for group in range(3):
        rows = [i for i in range(4 * group, 4 * group + 4) if mask[i]]
        raw = np.array([np.exp(advantages[i] / 0.5) for i in rows])
        np.testing.assert_allclose(weights[rows], raw / raw.mean(), rtol=1e-12)
    assert not weights[~mask].any()


def test_equal_advantages_weigh_nothing_up_and_large_ones_do_not_overflow() -> None:
    everyone = np.ones(6, dtype=bool)
    np.testing.assert_array_equal(exponential_weights(np.zeros(6), everyone, 3, 0.1), np.ones(6))
    weights = exponential_weights(np.array([1e6, 0.0, -1e6]), everyone[:3], 3, 0.1)
    np.testing.assert_array_equal(weights, [3.0, 0.0, 0.0])
    assert not exponential_weights(np.zeros(2), np.zeros(2, dtype=bool), 2, 1.0).any()


def test_the_best_of_each_prompt_share_the_weight() -> None:
    advantages = np.array([0.1, 0.9, 0.5, 0.9, 5.0, -1.0, -2.0, -3.0])
    mask = np.array([True, True, True, True, False, True, True, True])
    weights = best_weights(advantages, mask, 4, 2)
    np.testing.assert_array_equal(weights, [0, 2, 0, 2, 0, 1.5, 1.5, 0])


# ---- what the network should have said -----------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_target_is_the_output_that_leads_back_to_the_sample(prediction_type: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction_type, steps_offset=1)
    process = Ddim.of(scheduler, 5, 1.0)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 8, 8, generator=generator)
    step = torch.arange(5)
    x, target = process.forward(step, x0, noise), process.target(step, x0, noise)
    torch.testing.assert_close(process.x0(step, x, target), x0, atol=1e-4, rtol=1e-4)
    # A custom process inherits it.
    torch.testing.assert_close(
        Process.target(process, step, x0, noise), target, atol=1e-4, rtol=1e-3
    )


# ---- gradients -----------------------------------------------------------------------------------


def _to_double(learner: ForwardLearner) -> ForwardLearner:
    backbone = learner.backbone
    for module in (*backbone.text_encoders, backbone.denoiser, backbone.vae):
        module.double()
    return learner


@pytest.fixture
def made(double: None, tiny_backbone: Load, randomize: Callable[..., None]) -> Callable[..., Any]:
    """A float64 learner, and the batch that its policy sampled."""

    def make(
        kind: str, mask: np.ndarray = EVERYONE, path: Path | None = None, **sections: Any
    ) -> tuple[ForwardLearner, UpdateBatch]:
        backbone = tiny_backbone() if path is None else load_backbone(str(path))
        learner = make_learner(backbone, forward_config(kind, **sections))
        assert isinstance(learner, ForwardLearner)
        randomize(_to_double(learner).adapter, seed=1)
        learner.copies_from_adapter()
        return learner, sampled(learner, mask)

    return make


def _moved(learner: ForwardLearner, batch: UpdateBatch) -> None:
    """Some way into an update: the weights are no longer those that it started with."""
    if isinstance(learner, AwmLearner):
        learner._before = learner._errors(batch)
    if isinstance(learner, NftLearner):
        learner._old = learner._copy()
    for parameter in learner.parameters:
        parameter.data = parameter.data * 1.05


def _gradient(learner: ForwardLearner, batch: UpdateBatch) -> list[Tensor]:
    return learner._minibatch(batch, np.arange(len(batch)))[0]


class _Plain:
    """The same losses, one (sample, level) at a time, each with an encoder pass of its own."""

    def __init__(self, learner: ForwardLearner, batch: UpdateBatch) -> None:
        self.learner, self.batch = learner, batch
        self.levels = learner._levels(batch)
        self.noise = learner._noise(batch, np.arange(len(batch)))
        self.objective: Any = learner.config.objective
        self.used = np.flatnonzero(batch.mask)

    def output(self, i: int, k: int) -> tuple[Tensor, Conditioning, Tensor, Tensor, Tensor]:
        """(output, embeddings, x, clean, step)."""
        backbone, process = self.learner.backbone, self.learner.process
        step = torch.tensor([self.levels[i, k]])
        last = np.array([STEPS])
        clean = torch.from_numpy(self.batch.trajectory.latents_at(np.array([i]), last)).double()
        x = process.forward(step, clean, self.noise[int(i)][k][None])
        ids = tuple(torch.from_numpy(part[[i]]) for part in self.batch.trajectory.prompt_ids)
        conditioning = backbone.encode(ids)
        output = backbone.predict(x, process.timesteps[step], conditioning)
        return output.double(), conditioning, x, clean, step

    def target(self, clean: Tensor, epsilon: Tensor, step: Tensor) -> Tensor:
        """As diffusers' training scripts compute it."""
        scheduler = self.learner.backbone.scheduler
        kind = scheduler.config.prediction_type
        if kind == "v_prediction":
            timestep = self.learner.process.timesteps[step]
            return scheduler.get_velocity(clean, epsilon.double(), timestep)
        return clean if kind == "sample" else epsilon

    def loss(self, i: int, k: int) -> Tensor:
        objective, advantage = self.objective, float(self.batch.advantages[i])
        output, embeddings, x, clean, step = self.output(i, k)
        epsilon = self.noise[int(i)][k][None]
        target = self.target(clean, epsilon, step)
        error = ((output - target) ** 2).mean()
        with torch.no_grad(), self.learner.adapter.disabled():
            base, untouched, *_ = self.output(i, k)
        if objective.kind == "rwr":
            raw = np.exp(self.batch.advantages / objective.temperature) * self.batch.mask
            loss = raw[i] / raw.sum() * len(self.used) * error
        elif objective.kind == "raft":
            order = sorted(self.used, key=lambda j: -self.batch.advantages[j])
            loss = (i in order[: objective.best]) * len(self.used) / objective.best * error
        elif objective.kind == "awm":
            old = ((self.before[i, k] - target) ** 2).mean()
            ratio = (old - error).exp()
            limited = ratio.clamp(1 - objective.clip_range, 1 + objective.clip_range)
            loss = -torch.minimum(ratio * advantage, limited * advantage)
        else:
            process, beta, largest = self.learner.process, objective.beta, objective.advantage_max
            good = min(max(0.5 + advantage / (2 * largest), 0.0), 1.0)
            old_output, loss = self.before[i, k], torch.zeros(())
            for sign, share in ((1, good), (-1, 1 - good)):
                # The paper's mixture of the two policies' outputs.
                mixed = (1 - sign * beta) * old_output + sign * beta * output
                away = process.x0(step, x, mixed) - clean
                width = max(float(away.detach().abs().mean()), 1e-5)
                loss = loss + largest * share * (away**2).mean() / (beta * width)
        loss = loss + objective.anchor_weight * ((output - base) ** 2).mean()
        away = ((embeddings.hidden - untouched.hidden) ** 2).mean()
        if embeddings.pooled is not None:
            away = away + ((embeddings.pooled - untouched.pooled) ** 2).mean()
        return loss + objective.embedding_anchor_weight * away

    def gradient(self, before: list[Tensor]) -> list[Tensor]:
        """`before`: the weights of the policy that the update started with."""
        places = [(i, k) for i in self.used for k in range(self.levels.shape[1])]
        with torch.no_grad(), self.learner._weights(before):
            self.before = {place: self.output(*place)[0] for place in places}
        losses = [self.loss(*place) for place in places]
        mean = torch.stack([loss.reshape(()) for loss in losses]).mean()
        found = torch.autograd.grad(mean, self.learner.parameters, allow_unused=True)
        pairs = zip(found, self.learner.parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]


@pytest.mark.parametrize("part", ["text_encoder", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_plain_autograd(kind: str, part: str, made: Callable) -> None:
    lora = {"denoiser": {"rank": 2, "alpha": 2.0}} if part == "both" else {}
    learner, batch = made(kind, np.array([True, True, False, True]), lora=lora)
    before = [p.detach().clone() for p in learner.parameters]
    _moved(learner, batch)
    expected = _Plain(learner, batch).gradient(before)
    _assert_close(_gradient(learner, batch), expected)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_so_is_that_of_two_encoders(kind: str, made: Callable, pipelines: dict[str, Path]) -> None:
    """SDXL: two encoders, pooled embeddings, a last layer that is not read."""
    learner, batch = made(kind, path=pipelines["sdxl"])
    assert set(learner.adapter.parts) == {"text_encoder", "text_encoder_2"}
    before = [p.detach().clone() for p in learner.parameters]
    _moved(learner, batch)
    ours, expected = _gradient(learner, batch), _Plain(learner, batch).gradient(before)
    _assert_close(ours, expected)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["nft", "awm"])
def test_so_it_is_with_other_prediction_types(
    kind: str, prediction_type: str, made: Callable, changed_pipeline: Callable
) -> None:
    file = "scheduler/scheduler_config.json"
    learner, batch = made(kind, path=changed_pipeline(file, {"prediction_type": prediction_type}))
    assert learner.process.prediction_type == prediction_type
    before = [p.detach().clone() for p in learner.parameters]
    _moved(learner, batch)
    _assert_close(_gradient(learner, batch), _Plain(learner, batch).gradient(before))


def _assert_close(ours: list[Tensor], expected: list[Tensor], rtol: float = 1e-5) -> None:
    assert any(float(t.abs().max()) > 1e-5 for t in expected)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


def test_equal_rewards_are_plain_fine_tuning_on_its_own_samples(made: Callable) -> None:
    learner, batch = made("rwr", objective=FREE)
    batch = replace(batch, advantages=np.full(4, 0.3))
    plain = learner._shard(batch, np.arange(4), 4, Noised.error)[0]
    _assert_close(_gradient(learner, batch), plain)


def _towards_samples(learner: ForwardLearner, batch: UpdateBatch, sign: np.ndarray) -> list[Tensor]:
    """Gradient of the mean of sign |x0 - clean|^2 / w."""

    def loss(noised: Noised, output: Tensor) -> Tensor:
        away = learner.process.x0(noised.step, noised.x, output) - noised.clean
        width = away.detach().abs().mean(dim=(1, 2, 3))
        return torch.from_numpy(sign[noised.pairs.sample]) * mean_square(away) / width

    return learner._shard(batch, np.arange(len(batch)), len(batch), loss)[0]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_with_the_policy_at_the_old_one_is_signed_regression_whatever_beta(
    beta: float, made: Callable
) -> None:
    """The step from the old policy is along 2 r - 1: towards good samples, away from bad ones."""
    learner, batch = made("nft", objective={"beta": beta, **FREE})
    learner._old = learner._copy()
    probability = np.clip(0.5 + batch.advantages / 3.0, 0, 1)
    assert probability.min() == 0
    expected = _towards_samples(learner, batch, 1.5 * (2 * probability - 1))
    _assert_close(_gradient(learner, batch), expected)


def test_nft_on_good_samples_alone_with_beta_1_is_rejection_fine_tuning(made: Callable) -> None:
    learner, batch = made("nft", objective={"beta": 1.0, **FREE})
    batch = replace(batch, advantages=np.full(4, 9.0))
    _moved(learner, batch)
    _assert_close(_gradient(learner, batch), _towards_samples(learner, batch, np.full(4, 1.5)))


def test_nft_learns_nothing_from_samples_that_are_neither_good_nor_bad(made: Callable) -> None:
    learner, batch = made("nft", objective=FREE)
    learner._old = learner._copy()
    largest = max(float(g.abs().max()) for g in _gradient(learner, batch))
    nothing = _gradient(learner, replace(batch, advantages=np.zeros(4)))
    assert max(float(g.abs().max()) for g in nothing) < 1e-9 * largest
