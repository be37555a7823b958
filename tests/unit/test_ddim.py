"""Our closed-form DDIM step against diffusers' scheduler and torch's distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from texforce_ray.diffusion.ddim import PREDICTION_TYPES, Ddim
from texforce_ray.model.backbone import guide

SHAPE = (3, 4, 8, 8)


def _scheduler(**changes: Any) -> DDIMScheduler:
    options: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    scheduler = DDIMScheduler(**options | changes)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def _normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _all(index: int) -> Tensor:
    return torch.full((SHAPE[0],), index)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 7, 50])
def test_every_step_is_the_schedulers(prediction_type: str, eta: float, steps: int) -> None:
    scheduler = _scheduler(prediction_type=prediction_type)
    process = Ddim.of(scheduler, steps, eta)
    x, prediction, noise = _normal(1), _normal(2), _normal(3)
    assert process.timesteps.tolist() == scheduler.timesteps.tolist()
    for index, t in enumerate(process.timesteps.tolist()):
        expected = scheduler.step(prediction, t, x, eta=eta, variance_noise=noise).prev_sample
        still = scheduler.step(prediction, t, x, eta=eta, variance_noise=0 * noise).prev_sample
        mean = process.mean(_all(index), x, prediction)
        variance = eta**2 * scheduler._get_variance(t, t - 1000 // steps)
        torch.testing.assert_close(mean, still, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            process.advance(_all(index), mean, noise), expected, rtol=1e-6, atol=1e-6
        )
        assert float(process.sigma[index]) ** 2 == pytest.approx(float(variance), abs=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
        {"set_alpha_to_one": True},
        {"steps_offset": 0},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    ],
)
def test_other_schedules_agree_too(changes: dict[str, Any]) -> None:
    scheduler = _scheduler(prediction_type="v_prediction", **changes)
    process = Ddim.of(scheduler, 10, 1.0)
    x, prediction, noise = _normal(1), _normal(2), _normal(3)
    for index, t in enumerate(process.timesteps.tolist()):
        expected = scheduler.step(prediction, t, x, eta=1.0, variance_noise=noise).prev_sample
        mean = process.mean(_all(index), x, prediction)
        ours = process.advance(_all(index), mean, noise)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_forward_noises_as_the_scheduler_and_x0_undoes_it(prediction_type: str) -> None:
    scheduler = _scheduler(prediction_type=prediction_type)
    process = Ddim.of(scheduler, 7, 1.0)
    clean, noise = _normal(1), _normal(2)
    for index, t in enumerate(process.timesteps):
        noisy = process.forward(_all(index), clean, noise)
        torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, t), rtol=1e-6, atol=0)
        right = {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": scheduler.get_velocity(clean, noise, t),
        }[prediction_type]
        torch.testing.assert_close(
            process.x0(_all(index), noisy, right), clean, rtol=1e-6, atol=1e-6
        )


def test_samples_of_one_batch_may_be_at_different_steps() -> None:
    process = Ddim.of(_scheduler(), 5, 1.0)
    x, prediction = _normal(1), _normal(2)
    mixed = torch.tensor([4, 0, 2])
    mean = process.mean(mixed, x, prediction)
    for row, index in enumerate(mixed.tolist()):
        alone = process.mean(_all(index), x, prediction)[row]
        torch.testing.assert_close(mean[row], alone, rtol=0, atol=0)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_log_prob_is_the_normal_density_averaged(eta: float) -> None:
    process = Ddim.of(_scheduler(), 5, eta)
    mean, x_prev = _normal(4), _normal(5)
    for index in process.trainable:
        normal = Normal(mean, process.sigma[index])
        expected = normal.log_prob(x_prev).mean(dim=(1, 2, 3))
        ours = process.log_prob(_all(index), x_prev, mean)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


def test_step_kl_is_the_divergence_averaged() -> None:
    process = Ddim.of(_scheduler(), 5, 0.7)
    mean, reference = _normal(4), _normal(5)
    for index in process.trainable:
        sigma = process.sigma[index]
        expected = kl_divergence(Normal(mean, sigma), Normal(reference, sigma)).mean(dim=(1, 2, 3))
        ours = process.kl(_all(index), mean, reference)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


def test_steps_without_noise_are_never_trained() -> None:
    assert Ddim.of(_scheduler(), 6, 0.0).trainable == []
    assert Ddim.of(_scheduler(), 6, 1.0).trainable == list(range(6))
    last_is_exact = Ddim.of(_scheduler(set_alpha_to_one=True), 6, 1.0)
    assert last_is_exact.trainable == list(range(5))
    # Without an offset the last timestep is 0, and its predecessor the same noise level.
    assert Ddim.of(_scheduler(steps_offset=0), 6, 1.0).trainable == list(range(5))


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 100, 333, 999])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_float32_coefficients_are_finite(steps: int, zero_snr: bool) -> None:
    scheduler = DDIMScheduler(
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_snr,
        clip_sample=False,
    )
    process = Ddim.of(scheduler, steps, 1.0)
    x = _normal(1).float()
    for index in range(steps):
        assert process.mean(_all(index), x, x).isfinite().all(), index


def test_unknown_prediction_type_is_named() -> None:
    scheduler = _scheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match=r"'flow'.*v_prediction"):
        Ddim.of(scheduler, 5, 1.0)


def test_guidance_of_one_is_the_conditional_prediction() -> None:
    unconditional, conditional = _normal(6), _normal(7)
    torch.testing.assert_close(guide(unconditional, conditional, 1.0), conditional)
    torch.testing.assert_close(
        guide(unconditional, conditional, 5.0), 5 * conditional - 4 * unconditional
    )
