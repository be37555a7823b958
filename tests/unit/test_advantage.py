"""Rewards to advantages: masked samples never count, equal rewards teach nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from texforce_ray.rl.advantage import (
    Component,
    PromptStatistics,
    batch_advantages,
    combine,
    group_advantages,
)

ALL = np.ones(6, dtype=bool)
TWO_PROMPTS = ["a", "b", "a", "b", "a", "b"]
REWARDS = np.array([1.0, 10.0, 2.0, 30.0, 6.0, 20.0])

_samples = st.lists(
    st.tuples(st.sampled_from("abc"), st.floats(-100, 100, width=32), st.booleans()),
    min_size=1,
    max_size=24,
)


def _normalized(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() + 1e-6)


def test_combine_sums_weighted_components() -> None:
    rewards = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 60.0]])
    total = combine(rewards, np.ones(3, dtype=bool), [Component(2.0), Component(-0.5)])
    np.testing.assert_allclose(total, [-3.0, -6.0, -24.0])


def test_combine_normalises_over_scored_samples_only() -> None:
    rewards = np.array([[1.0, 10.0], [np.nan, 999.0], [2.0, 20.0], [6.0, 60.0]])
    mask = np.array([True, False, True, True])
    total = combine(rewards, mask, [Component(1.0), Component(3.0, "batch")])
    expected = rewards[mask, 0] + 3 * _normalized(rewards[mask, 1])
    np.testing.assert_allclose(total[mask], expected, rtol=1e-9)
    assert total[1] == 0


def test_combine_of_nothing_scored_is_zero() -> None:
    total = combine(np.full((3, 1), np.nan), np.zeros(3, dtype=bool), [Component(1.0, "batch")])
    assert total.tolist() == [0, 0, 0]


def test_batch_mode_is_the_z_score() -> None:
    np.testing.assert_allclose(batch_advantages(REWARDS, ALL), _normalized(REWARDS))


def test_group_mode_is_the_z_score_within_each_prompt() -> None:
    advantages = group_advantages(REWARDS, ALL, TWO_PROMPTS)
    np.testing.assert_allclose(advantages[::2], _normalized(REWARDS[::2]))
    np.testing.assert_allclose(advantages[1::2], _normalized(REWARDS[1::2]))


def test_batch_scale_keeps_what_is_at_stake() -> None:
    advantages = group_advantages(REWARDS, ALL, TWO_PROMPTS, scale="batch")
    centered = np.concatenate([REWARDS[::2] - 3, REWARDS[1::2] - 20])
    deviation = np.sqrt((centered**2).mean())
    np.testing.assert_allclose(advantages[::2], (REWARDS[::2] - 3) / deviation, rtol=1e-5)
    np.testing.assert_allclose(advantages[1::2], (REWARDS[1::2] - 20) / deviation, rtol=1e-5)


@pytest.mark.parametrize("scale", ["own", "batch"])
def test_equal_rewards_teach_nothing(scale: str) -> None:
    rewards = np.array([0.1 + 0.2, 5.0, 0.3, 7.0])
    advantages = group_advantages(rewards, ALL[:4], ["a", "b", "a", "b"], scale)
    np.testing.assert_allclose(advantages[[0, 2]], 0, atol=1e-12)
    assert advantages[3] > 0.5
    assert batch_advantages(np.full(4, 0.7), ALL[:4]).tolist() == [0, 0, 0, 0]
    statistics = PromptStatistics(buffer_size=8, min_count=2)
    assert statistics.advantages(np.full(4, 0.7), ALL[:4], ["a"] * 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 1e6])
def test_advantages_do_not_depend_on_the_rewards_scale(size: float) -> None:
    rewards, statistics = REWARDS * size, PromptStatistics(buffer_size=8, min_count=2)
    for mode in (
        lambda: batch_advantages(rewards, ALL),
        lambda: group_advantages(rewards, ALL, TWO_PROMPTS),
        lambda: group_advantages(rewards, ALL, TWO_PROMPTS, "batch"),
        lambda: statistics.advantages(rewards, ALL, TWO_PROMPTS),
        lambda: combine(rewards[:, None], ALL, [Component(1.0, "batch")]),
        lambda: combine(rewards[:, None], ALL, [Component(1.0, "group")], TWO_PROMPTS),
    ):
        found = mode()
        assert found[ALL].std() == pytest.approx(1, abs=0.3)
        assert (np.diff(found[::2]) > 0).all()
    one_scale = group_advantages(REWARDS, ALL, TWO_PROMPTS)
    np.testing.assert_allclose(
        group_advantages(rewards, ALL, TWO_PROMPTS), one_scale, rtol=1e-2, atol=1e-9
    )
    # Prompts of different sizes: each has its own.
    mixed = np.where(np.arange(6) % 2, REWARDS, rewards)
    np.testing.assert_allclose(
        group_advantages(mixed, ALL, TWO_PROMPTS), one_scale, rtol=1e-2, atol=1e-9
    )


def test_rounding_of_equal_rewards_teaches_nothing() -> None:
    rewards = np.float32(0.7) + np.float32([0, 6e-8, -6e-8, 0])
    for values in (rewards.astype(float), 1e-6 * rewards.astype(float)):
        assert batch_advantages(values, ALL[:4]).tolist() == [0, 0, 0, 0]
        assert group_advantages(values, ALL[:4], ["a"] * 4).tolist() == [0, 0, 0, 0]


@given(_samples)
def test_groups_have_mean_zero_and_keep_their_order(samples: list) -> None:
    prompts = [prompt for prompt, _, _ in samples]
    rewards = np.array([value for _, value, _ in samples], dtype=np.float64)
    mask = np.array([known for _, _, known in samples])
    for scale in ("own", "batch"):
        advantages = group_advantages(rewards, mask, prompts, scale)
        assert (advantages[~mask] == 0).all()
        for prompt in set(prompts):
            rows = np.array([p == prompt for p in prompts]) & mask
            assert advantages[rows].sum() == pytest.approx(0, abs=1e-5)
            order = np.argsort(rewards[rows], kind="stable")
            assert (np.diff(advantages[rows][order]) >= 0).all()


@given(_samples, st.floats(-1e6, 1e6))
def test_masked_samples_have_no_influence(samples: list, garbage: float) -> None:
    prompts = [prompt for prompt, _, _ in samples]
    rewards = np.array([[value] for _, value, _ in samples], dtype=np.float64)
    mask = np.array([known for _, _, known in samples])
    other = np.where(mask[:, None], rewards, garbage)

    def every_mode(values: np.ndarray) -> np.ndarray:
        total = combine(values, mask, [Component(1.5, "batch")])
        raw = values[:, 0]
        return np.stack(
            [
                total,
                batch_advantages(raw, mask),
                group_advantages(raw, mask, prompts),
                group_advantages(raw, mask, prompts, "batch"),
                PromptStatistics(4, 2).advantages(raw, mask, prompts),
                PromptStatistics(4, 2).advantages(raw, mask, prompts, "batch"),
            ]
        )

    ours = every_mode(rewards)
    np.testing.assert_array_equal(ours, every_mode(other))
    assert (ours[:, ~mask] == 0).all()


def test_prompt_mode_uses_the_batch_until_a_prompt_is_warm() -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=4)
    first = statistics.advantages(REWARDS, ALL, TWO_PROMPTS)
    np.testing.assert_allclose(first, _normalized(REWARDS))
    rewards = np.array([4.0, 8.0, 100.0])
    second = statistics.advantages(rewards, ALL[:3], ["a", "a", "c"])
    # "a" remembers its newest four rewards; "c" is cold and gets the batch's statistics.
    buffer = np.array([2.0, 6.0, 4.0, 8.0])
    np.testing.assert_allclose(second[:2], (rewards[:2] - 5.0) / buffer.std(), rtol=1e-5)
    np.testing.assert_allclose(second[2], _normalized(rewards)[2], rtol=1e-5)
    assert statistics.buffers == {"a": buffer.tolist(), "b": [10.0, 30.0, 20.0], "c": [100.0]}


def test_buffer_forgets_the_oldest_rewards() -> None:
    statistics = PromptStatistics(buffer_size=3, min_count=2)
    for value in range(7):
        statistics.advantages(np.array([float(value)]), ALL[:1], ["a"])
    assert statistics.buffers == {"a": [4.0, 5.0, 6.0]}


def test_masked_rewards_are_not_remembered() -> None:
    statistics = PromptStatistics(buffer_size=8, min_count=2)
    mask = np.array([True, False, True])
    statistics.advantages(np.array([1.0, np.nan, 3.0]), mask, ["a", "a", "b"])
    assert statistics.buffers == {"a": [1.0], "b": [3.0]}


def test_rare_prompt_with_one_sample_gets_an_advantage_from_its_history() -> None:
    statistics = PromptStatistics(buffer_size=8, min_count=3)
    for value in (1.0, 2.0):
        statistics.advantages(np.array([value]), ALL[:1], ["a"])
    (advantage,) = statistics.advantages(np.array([6.0]), ALL[:1], ["a"])
    history = np.array([1.0, 2.0, 6.0])
    assert advantage == pytest.approx(_normalized(history)[2], rel=1e-5)


# ---- gates and normalisation by group ----------------------------------------------------------


def test_a_gated_sample_loses_whatever_the_scale() -> None:
    rewards = np.array([[0.9, 5.0], [0.1, 900.0], [0.8, -40.0], [0.2, 3.0]])
    mask = np.ones(4, dtype=bool)
    components = [Component(1.0, gate=0.5), Component(1.0)]
    total = combine(rewards, mask, components)
    assert total.tolist() == [5.9, -39.2, -39.2, -39.2]


@pytest.mark.parametrize("honest", [[-3.0, -2.0], []])
def test_in_evaluation_a_gate_never_helps(honest: list[float]) -> None:
    """It decides which checkpoint is the best: a floor of 0 was better than honest totals."""
    components = [Component(0.0, gate=0.5), Component(1.0)]
    gated = [-9.0, -1.0, 4.0]
    rewards = np.array([[1.0, x] for x in honest] + [[0.0, x] for x in gated])
    total = combine(rewards, np.ones(len(rewards), bool), components, never_raise=True)
    assert total[: len(honest)].tolist() == honest
    for value, own in zip(total[len(honest) :], gated, strict=True):
        assert value <= min([own, 0.0, *honest])


def test_a_masked_sample_is_not_gated_and_does_not_set_the_floor() -> None:
    rewards = np.array([[np.nan, 1.0], [0.1, 1.0], [0.9, 2.0]])
    mask = np.array([False, True, True])
    total = combine(rewards, mask, [Component(1.0, gate=0.5, floor=-1.0), Component(1.0)])
    assert total.tolist() == [0.0, -1.0, 2.9]


def test_components_normalised_by_group_weigh_alike_in_every_group() -> None:
    """GDPO: each reward's advantage within its prompt's group, then the sum."""
    prompts = ["a"] * 4 + ["b"] * 4
    rng = np.random.default_rng(0)
    small, large = rng.normal(size=8), 1000 * rng.normal(size=8)
    small[4:] *= 1e-2
    mask = np.ones(8, dtype=bool)
    rewards = np.stack([small, large], axis=1)
    total = combine(rewards, mask, [Component(1.0, "group"), Component(1.0, "group")], prompts)
    expected = group_advantages(small, mask, prompts) + group_advantages(large, mask, prompts)
    assert total == pytest.approx(expected)
    for rows in (slice(0, 4), slice(4, 8)):
        assert abs(np.corrcoef(total[rows], small[rows])[0, 1]) > 0.3
    plain = combine(rewards, mask, [Component(1.0), Component(1.0)], prompts)
    assert np.corrcoef(plain, large)[0, 1] > 0.999
