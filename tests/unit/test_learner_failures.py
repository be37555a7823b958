"""What goes wrong in an update: numbers that are not finite, masked samples, no noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tests.unit.learners import CPU, batch_of, configured, sample, weights_of
from texforce_ray.errors import ConfigError, NumericsError
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl import ppo
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.ppo_totals import Totals

Load = Callable[[], Backbone]


def _poisoned(learner: PpoLearner, monkeypatch: pytest.MonkeyPatch, updates: set[int]) -> None:
    """The gradients of these updates are not finite."""
    clean = learner._minibatch_gradient

    def gradient(*given: Any) -> list[Tensor]:
        found = clean(*given)
        return [g * float("nan") for g in found] if learner.updates in updates else found

    monkeypatch.setattr(learner, "_minibatch_gradient", gradient)


@pytest.mark.long
def test_an_update_without_a_finite_gradient_is_left_out(
    tiny_backbone: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = PpoLearner(tiny_backbone(), configured(update={"epochs": 3, "minibatches": 1}))
    _poisoned(learner, monkeypatch, {1, 2})
    metrics = learner.update(batch_of(sample(learner)))
    assert metrics["learner/skipped"] == 2
    assert np.isfinite(metrics["learner/grad_norm"])
    assert learner.updates == 3
    assert all(np.isfinite(value).all() for value in weights_of(learner).values())
    # Those in a row are counted over iterations and resumes.
    assert learner.learned().state.skipped == 2
    other = PpoLearner(tiny_backbone(), configured())
    other.load(learner.learned())
    assert other.skipped == 2


def test_too_many_in_a_row_stop_the_run_and_name_the_samples(
    tiny_backbone: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = PpoLearner(tiny_backbone(), configured(update={"epochs": 4, "max_skipped": 1}))
    _poisoned(learner, monkeypatch, {1, 2, 3})
    with pytest.raises(NumericsError, match=r"samples/iteration-00000\.parquet"):
        learner.update(batch_of(sample(learner)))


@pytest.mark.long
def test_updates_end_early_beyond_the_target_kl(tiny_backbone: Load) -> None:
    batch = batch_of(sample(PpoLearner(tiny_backbone(), configured())))
    done = {}
    for target in (None, 1e-12):
        config = configured(
            objective={"target_kl": target}, update={"epochs": 4}, optimizer={"lr": 0.05}
        )
        learner = PpoLearner(tiny_backbone(), config)
        metrics = learner.update(batch)
        done[target] = learner.updates
    assert done == {None: 4, 1e-12: 1}  # at first there is no KL to speak of
    assert metrics["ppo/updates_left_out"] == 3


def test_a_target_kl_recovers_after_a_batch_that_is_not_finite() -> None:
    totals = Totals(CPU)

    def result(kl: float) -> ppo.PpoLoss:
        ones = torch.ones(2)
        return ppo.PpoLoss(ones, ones, ones * kl, ones)

    totals.add(result(float("nan")), None, torch.zeros(2))
    assert np.isnan(totals.take_kl()[1])
    totals.add(result(5.0), None, torch.zeros(2))
    assert totals.take_kl() == [2.0, 10.0]
    assert totals.take_kl() == [0.0, 0.0]


@pytest.mark.long
@pytest.mark.parametrize(
    "schedule",
    [{"set_alpha_to_one": True}, {"steps_offset": 0}, {"timestep_spacing": "linspace"}],
    ids=lambda schedule: next(iter(schedule)),
)
@pytest.mark.parametrize("numbers", ["always", "float16"])
def test_steps_without_noise_enter_no_ratio(
    tiny_backbone: Load, schedule: dict[str, Any], numbers: str
) -> None:
    """A pipeline that was saved with Euler or DPM has DDIM's default, `set_alpha_to_one`."""
    backbone = tiny_backbone()
    backbone.scheduler = DDIMScheduler.from_config(backbone.scheduler.config, **schedule)
    sections: dict[str, Any] = {"objective": {"decoupled": "always", "timestep_fraction": 1.0}}
    if numbers == "float16":
        sections = {
            "objective": {"timestep_fraction": 1.0},
            "diffusion": {"storage_dtype": "float16"},
        }
    learner = PpoLearner(backbone, configured(**sections))
    metrics = learner.update(batch_of(sample(learner)))
    assert metrics["ppo/ratio_error_first_pass"] < 1e-4
    assert np.isfinite(metrics["ppo/loss"])


def test_a_model_whose_only_step_has_no_noise_is_refused(tiny_backbone: Load) -> None:
    backbone = tiny_backbone()
    backbone.scheduler = DDIMScheduler.from_config(backbone.scheduler.config, set_alpha_to_one=True)
    with pytest.raises(ConfigError, match=r"diffusion\.steps: 1 steps"):
        PpoLearner(backbone, configured(diffusion={"steps": 1}))


@pytest.mark.long
@pytest.mark.parametrize("stale", [False, True])
def test_a_masked_sample_of_nan_enters_no_number(tiny_backbone: Load, stale: bool) -> None:
    learner = PpoLearner(tiny_backbone(), configured(objective={"decoupled": "always"}))
    trajectory = sample(learner)
    trajectory.latents[2, 1:], trajectory.log_probs[2] = np.nan, np.nan
    mask = np.array([True, True, False, True])
    behaviour = learner.learned().snapshot if stale else None
    metrics = learner.update(batch_of(trajectory, mask), behaviour)
    assert metrics["ppo/ratio_error_first_pass"] < 1e-5
    assert metrics["learner/skipped"] == 0
    assert all(np.isfinite(value).all() for value in weights_of(learner).values())


def test_a_minibatch_that_is_all_masked_is_no_optimizer_step(tiny_backbone: Load) -> None:
    learner = PpoLearner(tiny_backbone(), configured(update={"minibatches": 2}))
    mask = np.zeros(4, dtype=bool)
    mask[learner._minibatches(batch_of(sample(learner)), 0)[0]] = True
    learner.update(batch_of(sample(learner), mask))
    steps = {k: v for k, v in learner.learned().state.optimizer.items() if k.endswith("/step")}
    assert {float(step) for step in steps.values()} == {1.0}
    assert learner.updates == 2  # the schedule continues


@pytest.mark.long
def test_a_target_kl_hides_no_gradient_that_is_not_finite(tiny_backbone: Load) -> None:
    learner = PpoLearner(
        tiny_backbone(), configured(objective={"target_kl": 0.1}, update={"max_skipped": 0})
    )
    trajectory = sample(learner)
    trajectory.latents[1] = np.nan
    with pytest.raises(NumericsError, match=r"ratio - 1\| = nan|norm nan"):
        learner.update(batch_of(trajectory))
    learner = PpoLearner(
        tiny_backbone(),
        configured(
            objective={"target_kl": 0.1, "max_ratio_error": float("inf")}, update={"max_skipped": 0}
        ),
    )
    batch = replace(batch_of(sample(learner)), advantages=np.array([np.nan, 1.0, 1.0, 1.0]))
    with pytest.raises(NumericsError, match="norm nan"):
        learner.update(batch)
