"""A reward with weight 0 is a check on the run: recorded raw, and without any influence on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.driver.advantages import AdvantageEstimator
from texforce_ray.driver.collect import ScoredBatch, TrainingBatch, check_masked, is_scored
from texforce_ray.driver.iteration_metrics import reward_metrics
from texforce_ray.errors import RewardError

PROMPTS = ("a red circle",) * 4 + ("a blue square",) * 4
TRAINED = np.array([0.1, 0.4, 0.2, 0.9, 0.3, 0.5, 0.8, 0.6])
OTHER = np.array([30.0, 10.0, 20.0, 90.0, 50.0, 70.0, 60.0, 40.0])


def _config(**held_out: Any) -> Config:
    rewards = [{"name": "shapes"}, {"name": "appearance", "weight": 0, **held_out}]
    return make_config({"rewards": rewards, "advantage": {"mode": "group"}})


def _training(config: Config, rewards: np.ndarray) -> TrainingBatch:
    batch = ScoredBatch(
        0, 0, PROMPTS, np.arange(8), (), (), rewards, {}, (), {"shapes": 0.0, "appearance": 0.0}
    )
    mask = is_scored(config, rewards)
    return TrainingBatch(batch, mask, *AdvantageEstimator(config, {}).advantages(batch, mask))


@pytest.mark.parametrize("normalize", ["none", "batch", "group"])
@pytest.mark.parametrize("failures", [0, 3, 8])
def test_it_is_recorded_raw_and_changes_nothing(normalize: str, failures: int) -> None:
    alone = make_config({"rewards": [{"name": "shapes"}], "advantage": {"mode": "group"}})
    expected = _training(alone, TRAINED[:, None])
    config, other = _config(normalize=normalize), OTHER.copy()
    other[:failures] = np.nan
    training = _training(config, np.stack([TRAINED, other], axis=1))
    check_masked(config, training.scored.rewards, {}, "iteration 0")
    assert training.mask.all()
    assert training.total.tolist() == TRAINED.tolist()
    assert training.advantages.tolist() == expected.advantages.tolist()
    metrics = reward_metrics(config, training)
    assert metrics["reward/total_mean"] == TRAINED.mean()
    assert metrics["reward/masked"] == 0
    assert metrics["reward/appearance_masked"] == failures
    if failures < 8:
        assert metrics["reward/appearance_mean"] == OTHER[failures:].mean()
        assert metrics["reward/appearance_std"] == OTHER[failures:].std()
        expected_correlation = np.corrcoef(TRAINED[failures:], OTHER[failures:])[0, 1]
        assert metrics["reward/appearance_correlation"] == pytest.approx(expected_correlation)


def test_with_a_gate_it_takes_part_and_its_failures_mask() -> None:
    config = _config(min=25.0)
    rewards = np.stack([TRAINED, OTHER], axis=1)
    training = _training(config, rewards)
    assert training.total[1] == training.total[2] == 0
    rewards[:4, 1] = np.nan
    assert is_scored(config, rewards).tolist() == [False] * 4 + [True] * 4
    with pytest.raises(RewardError, match="appearance could not score 4 of 8"):
        check_masked(config, rewards, {}, "iteration 0")


def test_failures_of_the_trained_reward_still_mask() -> None:
    rewards = np.stack([TRAINED, OTHER], axis=1)
    rewards[2, 0] = np.nan
    assert is_scored(_config(), rewards).tolist() == [True, True, False, *[True] * 5]
