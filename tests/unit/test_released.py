"""What speed is compared with computes the same: the released order of work, in benchmarks/."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from texforce_ray.config.io import make_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.ppo_anchor import Anchor
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.ppo_totals import Totals
from texforce_ray.rl.sharding import UpdateBatch

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
PROMPTS = ["a green circle"] * 3 + ["two red squares"] * 3


@pytest.mark.long
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_released_order_gives_the_same_samples_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
    tiny_backbone: Callable[[], Backbone],
    randomize: Callable[..., None],
    guidance_scale: float,
) -> None:
    monkeypatch.setattr(sys, "path", [BENCHMARKS, *sys.path])
    from released_schedule import ReleasedSchedule

    config = make_config(
        {
            "diffusion": {"steps": 4, "guidance_scale": guidance_scale},
            "prompts": {"per_iteration": 2, "samples_per_prompt": 3},
            "rollout": {"batch_size": 6},
            "objective": {"clip_range": 0.5},
            "update": {"minibatches": 1},
            "lora": {"text_encoder": {"rank": 2, "alpha": 2.0}},
        }
    )
    learner = PpoLearner(tiny_backbone(), config)
    randomize(learner.adapter, seed=1)
    released, seeds = ReleasedSchedule(learner), np.arange(6)
    theirs, images = released.sample(PROMPTS, seeds)
    sampler = Sampler(learner.backbone, steps=4, eta=1.0, guidance_scale=guidance_scale)
    ours, _ = sampler.sample(PROMPTS, seeds, 0)
    # Other batch shapes, other kernels: how far they round apart depends on the processor.
    np.testing.assert_allclose(ours.latents, theirs.latents, rtol=1e-4, atol=1e-4)
    assert images.shape == (6, *images.shape[1:3], 3)

    mask = np.array([True, True, False, True, True, True])
    batch = UpdateBatch(theirs, np.linspace(-2, 2, 6), mask)
    rows, steps = np.array([5, 0, 3, 1, 2, 4]), np.array([[0, 2]] * 3 + [[1, 3]] * 3)
    expected = released.gradient(batch, rows, steps)
    anchor, totals = Anchor.of(theirs.log_probs), [Totals(torch.device("cpu"))]
    found = learner._minibatch_gradient(batch, rows, steps, anchor, totals)
    scale = max(float(t.abs().max()) for t in expected)
    assert scale > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(("ppo", "epochs"), [({}, 1), ({"timestep_choice": "first"}, 1), ({}, 2)])
def test_the_released_order_trains_on_the_learners_pairs(
    monkeypatch: pytest.MonkeyPatch,
    tiny_backbone: Callable[[], Backbone],
    ppo: dict[str, object],
    epochs: int,
) -> None:
    monkeypatch.setattr(sys, "path", [BENCHMARKS, *sys.path])
    from released_schedule import ReleasedSchedule

    config = make_config(
        {
            "diffusion": {"steps": 4, "guidance_scale": 4.0, "storage_dtype": "float16"},
            "prompts": {"per_iteration": 2, "samples_per_prompt": 3},
            "rollout": {"batch_size": 6},
            "objective": {"decoupled": "never", **ppo},
            "update": {"minibatches": 2, "epochs": epochs},
        }
    )
    learner = PpoLearner(tiny_backbone(), config)
    released, state = ReleasedSchedule(learner), learner.learned()
    trajectory, _ = released.sample(PROMPTS, np.arange(6))
    assert trajectory.latents.dtype == np.float16
    batch = UpdateBatch(trajectory, np.linspace(-2, 2, 6), np.ones(6, dtype=bool))

    def pairs(update: Callable[[UpdateBatch], object]) -> list[tuple[list[int], list[list[int]]]]:
        seen: list[tuple[list[int], list[list[int]]]] = []

        def note(batch: UpdateBatch, rows: np.ndarray, steps: np.ndarray, *_: object) -> list:
            seen.append((rows.tolist(), steps.tolist()))
            return [torch.zeros_like(p) for p in learner.parameters]

        monkeypatch.setattr(learner, "_minibatch_gradient", note)
        monkeypatch.setattr(released, "gradient", note)
        monkeypatch.setattr(learner, "_check_agreement", lambda error: None)
        learner.load(state)
        update(batch)
        return seen

    ours = pairs(learner.update)
    assert len(ours) == 2 * config.update.epochs
    assert pairs(released.update) == ours
