"""The clipped loss, its gradient, and the numbers that are logged beside it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from texforce_ray.rl import ppo

_differences = st.floats(-2, 2)
_advantages = st.floats(-5, 5)
_clips = st.floats(1e-4, 0.5)


def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _gradient(difference: float, advantage: float, clip: float, weight: float = 1.0) -> float:
    log_prob = _one(difference).requires_grad_()
    result = ppo.clipped_loss(log_prob, _one(0.0), _one(advantage), clip, _one(weight))
    (gradient,) = torch.autograd.grad(result.loss.sum(), log_prob)
    return float(gradient)


@given(_differences, _advantages, _clips, st.floats(0, 2))
def test_loss_is_the_papers_formula(
    difference: float, advantage: float, clip: float, weight: float
) -> None:
    result = ppo.clipped_loss(_one(difference - 1), _one(-1.0), _one(advantage), clip, _one(weight))
    ratio = math.exp(difference)
    expected = -weight * min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
    assert float(result.loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert float(result.ratio) == pytest.approx(ratio, rel=1e-9)


@given(_differences, _advantages, _clips)
def test_gradient_ends_only_where_the_policy_has_gone_far_enough(
    difference: float, advantage: float, clip: float
) -> None:
    ratio = math.exp(difference)
    gradient = _gradient(difference, advantage, clip)
    too_good = advantage > 0 and ratio > 1 + clip * (1 + 1e-9)
    too_bad = advantage < 0 and ratio < 1 - clip * (1 + 1e-9)
    if too_good or too_bad:
        assert gradient == 0
    elif abs(abs(ratio - 1) - clip) > 1e-9:
        assert gradient == pytest.approx(-ratio * advantage, rel=1e-9, abs=1e-12)


def test_first_step_is_plain_policy_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(6, generator=generator, dtype=torch.float64)
    log_prob = torch.log_softmax(logits, 0)
    loss = ppo.clipped_loss(log_prob, log_prob.detach(), advantage, 1e-4).loss.sum()
    (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(advantage * log_prob).sum(), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_weight_scales_loss_and_gradient() -> None:
    assert _gradient(0.01, 1.5, 0.1, weight=0.25) == pytest.approx(
        0.25 * _gradient(0.01, 1.5, 0.1), rel=1e-12
    )


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=16))
def test_approximate_kl_is_never_negative(differences: list[float]) -> None:
    log_prob = torch.tensor(differences, dtype=torch.float32)
    zero = torch.zeros_like(log_prob)
    result = ppo.clipped_loss(log_prob, zero, zero, 1e-4)
    assert (result.approx_kl >= -1e-12).all()
    exact = log_prob.double().exp() - 1 - log_prob.double()
    torch.testing.assert_close(result.approx_kl.double(), exact, rtol=1e-4, atol=1e-7)


def test_clipped_counts_both_sides() -> None:
    log_prob = torch.tensor([0.9, 0.999, 1.0, 1.001, 1.1]).log()
    result = ppo.clipped_loss(log_prob, torch.zeros(5), torch.ones(5), 0.01)
    assert result.clipped.tolist() == [1, 0, 0, 0, 1]
    assert not result.ratio.requires_grad


def test_behaviour_weight_is_capped_above_only() -> None:
    proximal = torch.tensor([0.0, math.log(1.5), 5.0, -3.0])
    weight = ppo.behaviour_weight(proximal, torch.zeros(4), cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 1.5, 2.0, math.exp(-3)]))


def test_ratio_error_is_the_largest_deviation_of_either_sign() -> None:
    log_prob = torch.tensor([0.0, 1e-6, -2e-3])
    assert ppo.ratio_error(log_prob, torch.zeros(3)) == pytest.approx(2e-3, rel=2e-3)
    assert ppo.ratio_error(log_prob[:2], torch.zeros(2)) == pytest.approx(1e-6, rel=1e-4)
    assert math.isnan(ppo.ratio_error(torch.tensor([math.nan]), torch.zeros(1)))
