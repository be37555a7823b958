"""The sampler draws a stock pipeline's images, and stores exactly what it went on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.diffusion.trajectory import Trajectory, concatenate
from texforce_ray.model.backbone import Backbone, load_backbone

PROMPTS = ["a green circle", "two red squares", "a green circle", "", "a face & «something else»"]
SEEDS = np.array([1, 2**62 - 1, 333, 4444, 5])


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path) -> Backbone:
    return load_backbone(str(tiny_pipeline))


def _sampler(
    backbone: Backbone, steps: int = 4, guidance: float = 3.0, eta: float = 1.0
) -> Sampler:
    return Sampler(backbone, steps=steps, eta=eta, guidance_scale=guidance)


@pytest.mark.parametrize(("steps", "eta"), [(4, 1.0), (3, 0.3)])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_are_the_stock_pipelines(
    backbone: Backbone,
    stock_pipeline: Callable,
    stock_images: Callable[..., np.ndarray],
    steps: int,
    eta: float,
    guidance: float,
) -> None:
    _, ours = _sampler(backbone, steps, guidance, eta).sample(PROMPTS, SEEDS, 0)
    stock = stock_images(
        stock_pipeline(), PROMPTS, SEEDS, steps=steps, eta=eta, guidance_scale=guidance
    )
    assert ours.dtype == stock.dtype == np.uint8
    assert np.abs(ours.astype(int) - stock.astype(int)).max() <= 1
    assert np.abs(ours[0].astype(int) - ours[1].astype(int)).max() > 10


def test_evaluation_images_without_noise_are_the_stock_pipelines_own(
    backbone: Backbone, stock_pipeline: Callable, stock_images: Callable[..., np.ndarray]
) -> None:
    """eta = 0 is what a pipeline uses when nobody says otherwise."""
    training = _sampler(backbone, guidance=1.0)
    _, ours = training.drawing(guidance_scale=3.0, eta=0.0).sample(PROMPTS, SEEDS, 0)
    stock = stock_images(stock_pipeline(), PROMPTS, SEEDS, steps=4, eta=0.0, guidance_scale=3.0)
    assert np.abs(ours.astype(int) - stock.astype(int)).max() <= 1
    # The sampler that trains is what it was.
    _, before = _sampler(backbone, guidance=1.0).sample(PROMPTS, SEEDS, 0)
    np.testing.assert_array_equal(training.sample(PROMPTS, SEEDS, 0)[1], before)


def test_stored_trajectory_has_the_documented_shapes(backbone: Backbone) -> None:
    trajectory, images = _sampler(backbone).sample(PROMPTS, SEEDS, policy_version=7)
    assert trajectory.latents.shape == (5, 5, 4, 8, 8)
    assert trajectory.latents.dtype == trajectory.log_probs.dtype == np.float32
    assert trajectory.log_probs.shape == (5, 4)
    assert [part.shape for part in trajectory.prompt_ids] == [(5, 24)]
    assert (np.diff(trajectory.timesteps) < 0).all()
    assert trajectory.prompts == tuple(PROMPTS)
    assert trajectory.seeds.tolist() == SEEDS.tolist()
    assert trajectory.policy_version == 7
    assert images.shape == (5, 64, 64, 3)


def test_same_work_gives_the_same_bits(backbone: Backbone) -> None:
    sampler = _sampler(backbone)
    first, images = sampler.sample(PROMPTS, SEEDS, 0)
    torch.manual_seed(123)
    again, same = sampler.sample(PROMPTS, SEEDS, 0)
    np.testing.assert_array_equal(first.latents, again.latents)
    np.testing.assert_array_equal(first.log_probs, again.log_probs)
    np.testing.assert_array_equal(images, same)


def test_neighbours_in_the_batch_do_not_matter(backbone: Backbone) -> None:
    sampler = _sampler(backbone)
    whole, _ = sampler.sample(PROMPTS, SEEDS, 0)
    rows = [3, 1]
    part, _ = sampler.sample([PROMPTS[i] for i in rows], SEEDS[rows], 0)
    np.testing.assert_allclose(part.latents, whole.latents[rows], atol=1e-3)
    np.testing.assert_allclose(part.log_probs, whole.log_probs[rows], atol=1e-4)
    np.testing.assert_array_equal(part.latents[:, 0], whole.latents[rows, 0])


def _recomputed(backbone: Backbone, trajectory: Trajectory, sampler: Sampler) -> np.ndarray:
    ids = tuple(torch.from_numpy(part) for part in trajectory.prompt_ids)
    columns, denoiser = [], sampler.denoiser
    with torch.no_grad():
        conditioning, rows = denoiser.encode(ids)
        prepared = denoiser.prepare(conditioning)
        for index in range(len(trajectory.timesteps)):
            step = torch.full((len(trajectory),), index)
            x, x_prev = (
                torch.from_numpy(trajectory.latents[:, i]).to(backbone.dtype)
                for i in (index, index + 1)
            )
            mean = denoiser.mean(step, x, prepared, rows)
            columns.append(denoiser.process.log_prob(step, x_prev.float(), mean.float()))
    return torch.stack(columns, 1).numpy()


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_stored_latents_reproduce_the_likelihoods(backbone: Backbone, storage: str) -> None:
    sampler = Sampler(backbone, steps=4, eta=1.0, guidance_scale=3.0, storage_dtype=storage)
    trajectory, images = sampler.sample(PROMPTS, SEEDS, 0)
    assert trajectory.latents.dtype == np.dtype(storage)
    error = np.abs(_recomputed(backbone, trajectory, sampler) - trajectory.log_probs).max()
    assert error <= 1e-5
    # The image, too, comes from the stored x_0.
    decoded = backbone.decode(torch.from_numpy(trajectory.latents[:, -1]).float()).numpy()
    assert np.abs(decoded.astype(int) - images.astype(int)).max() <= 1


def test_rounded_storage_that_sampling_does_not_continue_from_is_noticed(
    backbone: Backbone,
) -> None:
    sampler = _sampler(backbone)
    trajectory, _ = sampler.sample(PROMPTS, SEEDS, 0)
    rounded = replace(trajectory, latents=trajectory.latents.astype(np.float16))
    error = np.abs(_recomputed(backbone, rounded, sampler) - trajectory.log_probs).max()
    assert error > 1e-5


def test_log_probs_are_those_of_the_noise_that_was_drawn(backbone: Backbone) -> None:
    sampler = _sampler(backbone)
    trajectory, _ = sampler.sample(PROMPTS, SEEDS, 0)
    for row, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(int(seed))
        first = torch.randn((1, 4, 8, 8), generator=generator)
        np.testing.assert_array_equal(trajectory.latents[row, 0], first[0].numpy())
        for index, sigma in enumerate(sampler.denoiser.process.sigma.tolist()):
            noise = torch.randn((1, 4, 8, 8), generator=generator).double()
            expected = float(-(noise**2).mean() / 2) - np.log(sigma) - 0.5 * np.log(2 * np.pi)
            assert trajectory.log_probs[row, index] == pytest.approx(expected, abs=2e-5)


def test_guidance_of_at_most_one_takes_one_pass(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, forward = [], backbone.denoiser.forward

    def noted(x: torch.Tensor, *given: Any, **named: Any) -> Any:
        sizes.append(len(x))
        return forward(x, *given, **named)

    monkeypatch.setattr(backbone.denoiser, "forward", noted)
    _sampler(backbone, guidance=1.0).sample(PROMPTS[:2], SEEDS[:2], 0)
    _sampler(backbone, guidance=3.0).sample(PROMPTS[:2], SEEDS[:2], 0)
    assert sizes == [2] * 4 + [4] * 4


def test_long_prompts_are_cut_and_counted(backbone: Backbone) -> None:
    long = "red " * 40
    tokens = backbone.tokenize(["a circle", long])
    assert tokens.truncated == [False, True]
    assert tokens.ids[0].shape == (2, 24)
    _, images = _sampler(backbone).sample([long], SEEDS[:1], 0)
    _, cut = _sampler(backbone).sample(["red " * 22], SEEDS[:1], 0)
    np.testing.assert_array_equal(images, cut)


def test_latents_that_nobody_reads_are_not_stored(backbone: Backbone) -> None:
    sampler = _sampler(backbone)
    whole, images = sampler.sample(PROMPTS, SEEDS, 0)
    keep = np.zeros((5, 5), dtype=bool)
    keep[0, [1, 2]], keep[1:, [0, 1, 4]] = True, True
    part, same = sampler.sample(PROMPTS, SEEDS, 0, keep)
    np.testing.assert_array_equal(images, same)
    assert part.latents.shape[:2] == (5, 3)
    sample, step = np.nonzero(keep)
    np.testing.assert_array_equal(part.latents_at(sample, step), whole.latents_at(sample, step))
    for missing in [(0, 0), (0, 4), (3, 2)]:
        with pytest.raises(LookupError, match="not kept"):
            part.latents_at(*(np.array([i]) for i in missing))
    wider = concatenate([part, whole])
    np.testing.assert_array_equal(wider.latents_at(sample, step), whole.latents_at(sample, step))
    np.testing.assert_array_equal(wider.latents[5:], whole.latents)


def test_batches_join_in_order(backbone: Backbone) -> None:
    sampler = _sampler(backbone)
    one, two = (sampler.sample(PROMPTS[s], SEEDS[s], 3)[0] for s in (slice(0, 2), slice(2, 5)))
    joined = concatenate([one, two])
    assert len(joined) == 5
    assert joined.prompts == tuple(PROMPTS)
    np.testing.assert_array_equal(joined.latents[2:], two.latents)
    np.testing.assert_array_equal(joined.prompt_ids[0][:2], one.prompt_ids[0])
    with pytest.raises(ValueError, match="policy versions 3 and 4"):
        concatenate([one, replace(two, policy_version=4)])
    with pytest.raises(ValueError, match="different timesteps"):
        concatenate([one, replace(two, timesteps=two.timesteps + 1)])
