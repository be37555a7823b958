"""The flow process: its kernels, its windows, and what they do to a schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from texforce_ray.config.io import make_config
from texforce_ray.diffusion.flow import KERNELS, Flow
from texforce_ray.diffusion.flow_scheduler import SeededFlowScheduler
from texforce_ray.errors import ConfigError

NOISY = [kernel for kernel in KERNELS if kernel != "ode"]
SD35 = {"shift": 3.0}  # Stable Diffusion 3.5's scheduler


def _flow(kernel: str, eta: float, steps: int, **scheduler: float) -> Flow:
    levels = FlowMatchEulerDiscreteScheduler(**scheduler)
    levels.set_timesteps(steps)
    return Flow.of(levels.timesteps, levels.sigmas, kernel, eta)


def _step(index: int, count: int) -> Tensor:
    return torch.full((count,), index)


def test_cps_with_a_1_is_the_stock_stochastic_sampler() -> None:
    stock = FlowMatchEulerDiscreteScheduler(**SD35, stochastic_sampling=True)
    stock.set_timesteps(6)
    flow = Flow.of(stock.timesteps, stock.sigmas, "cps", 1.0)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    for index in range(6):
        v, noise = (torch.randn(x.shape, generator=generator) for _ in range(2))
        torch.manual_seed(index)
        noise = torch.randn(x.shape)
        ours = flow.advance(_step(index, 2), flow.mean(_step(index, 2), x, v), noise)
        torch.manual_seed(index)
        theirs = stock.step(v, stock.timesteps[index], x, return_dict=False)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        x = theirs


def test_the_ode_has_the_bits_of_the_stock_euler_solver() -> None:
    stock = FlowMatchEulerDiscreteScheduler(**SD35)
    stock.set_timesteps(7)
    flow = Flow.of(stock.timesteps, stock.sigmas, "ode", 0.0)
    x, v = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for index in range(7):
        ours = flow.mean(_step(index, 3), x, v)
        x = stock.step(v, stock.timesteps[index], x, return_dict=False)[0]
        assert torch.equal(ours, x)
    assert not flow.trainable
    assert not flow.draws


@pytest.mark.parametrize("kernel", NOISY)
def test_marginals_stay_those_of_the_flow(kernel: str) -> None:
    """With the exact velocity of Gaussian data, noise changes no marginal: mean m, deviation d."""
    m, d, steps = 0.7, 0.5, 400
    flow = _flow(kernel, {"cps": 0.1, "flow": 0.3, "dance": 0.3}[kernel], steps)
    x = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(2)
    for index in range(steps):
        s = float(flow.levels[index])
        variance = (1 - s) ** 2 * d**2 + s**2
        # E[noise - x0 | x] of the joint Gaussian.
        v = (s - (1 - s) * d**2) / variance * (x - (1 - s) * m) - m
        step = _step(index, len(x))
        mean = flow.mean(step, x, v)
        drawn = torch.randn(x.shape, generator=noise)
        # The SDE of Flow-GRPO adds noise in its last step too, which nothing removes.
        x = mean if index == steps - 1 else flow.advance(step, mean, drawn)
    assert float(x.mean()) == pytest.approx(m, abs=0.02)
    assert float(x.std()) == pytest.approx(d, abs=0.02)


def test_sd35_shifts_its_smallest_level_twice() -> None:
    """diffusers 0.42: once when the scheduler is made, once more in `set_timesteps`."""
    flow = _flow("ode", 0.0, 10, **SD35)
    expected = [1.0, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876,
                0.278049, 0.008929, 0.0]  # fmt: skip
    np.testing.assert_allclose(flow.levels, expected, atol=1e-6)
    once = 3 * 1e-3 / (1 + 2 * 1e-3)
    assert float(flow.levels[-2]) == pytest.approx(3 * once / (1 + 2 * once), rel=1e-4)


def test_sensitivity_of_sd35s_schedule() -> None:
    """|d mean / d v| / deviation of each step, for which the published clip ranges hold."""
    cps = _flow("cps", 0.8, 10, **SD35).sensitivity()
    published = [0.044, 0.083, 0.131, 0.193, 0.276, 0.396, 0.600, 1.10, 32]
    np.testing.assert_allclose(cps[:-1], published, rtol=0.03)
    assert math.isinf(cps[-1])
    flow = _flow("flow", 0.7, 10, **SD35).sensitivity()
    assert float(flow[0]) == pytest.approx(0.057, abs=0.002)
    assert float(flow[-1]) == pytest.approx(1.77, abs=0.1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_noising_and_predicting_are_inverse(kernel: str) -> None:
    flow = _flow(kernel, 0.5, 5)
    clean, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    step = torch.arange(5)
    x = flow.forward(step, clean, noise)
    target = flow.target(step, clean, noise)
    torch.testing.assert_close(flow.x0(step, x, target), clean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target, noise - clean)


def test_steps_outside_a_window_are_the_odes() -> None:
    whole, ode = _flow("cps", 0.8, 6), _flow("ode", 0.0, 6)
    part = whole.windowed([1, 2])
    assert part.trainable == [1, 2]
    assert list(part.draws) == [1, 2]
    x, v = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    step = torch.arange(6)
    mean = part.mean(step, x, v)
    assert torch.equal(mean[[1, 2]], whole.mean(step, x, v)[[1, 2]])
    outside = [0, 3, 4, 5]
    assert torch.equal(mean[outside], ode.mean(step, x, v)[outside])
    with pytest.raises(ValueError, match="do not descend"):
        Flow.of(torch.arange(2), torch.tensor([0.5, 0.6, 0.0]), "cps", 0.8)


def _windows(**window: object) -> list[list[int]]:
    config = make_config({"diffusion": {"process": "flow", "steps": 10, "window": window}})
    found = [config.window_steps(iteration) for iteration in range(60)]
    assert found == [config.window_steps(iteration) for iteration in range(60)]
    return [steps for steps in found if steps is not None]


def test_a_window_is_drawn_once_an_iteration_from_its_range() -> None:
    assert {tuple(steps) for steps in _windows(size=2, within=[1, 5])} == {(1, 2), (2, 3), (3, 4)}
    assert {steps[0] for steps in _windows()} == {0, 1, 2}  # three of the first half
    assert set(map(tuple, _windows(size=4, within=[0, 4]))) == {(0, 1, 2, 3)}


@pytest.mark.parametrize(
    ("diffusion", "wanted"),
    [
        ({"kernel": "flow"}, "kernel: 'flow' is for flow-matching models"),
        ({"process": "flow", "kernel": "ode", "eta": 0.5}, "eta: 0.5 with kernel 'ode'"),
        (
            {"process": "flow", "window": {"size": 4, "within": [0, 3]}},
            r"4 steps within \[0, 3\] of 10",
        ),
        ({"process": "flow", "window": {"size": 2, "within": [8, 12]}}, r"within \[8, 12\] of 10"),
        ({"window": {}}, "window: limits the noise of flow-matching models"),
        ({"process": "flow", "eta": 0, "window": {}}, "window: .* eta 0, which adds no noise"),
        ({"process": "flow", "kernel": "ode"}, "PPO has no likelihood"),
    ],
)
def test_settings_that_do_not_fit_are_refused(diffusion: dict, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        make_config({"diffusion": {"steps": 10, **diffusion}})


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"objective": {"timestep_choice": "first"}}, "timestep_choice: 'first' has no effect"),
        ({"objective": {"timestep_fraction": 0.3}}, "timestep_fraction: 0.3 has no effect with"),
    ],
)
def test_a_window_leaves_no_choice_of_steps(sections: dict, wanted: str) -> None:
    flow = {"process": "flow", "steps": 10, "window": {}}
    with pytest.raises(ConfigError, match=wanted):
        make_config({"diffusion": flow, **sections})


def test_evaluations_of_a_kernel_without_noise_have_none() -> None:
    with pytest.raises(ConfigError, match=r"eval.eta: 0.5 with diffusion.kernel 'ode'"):
        make_config(
            {
                "diffusion": {"process": "flow", "kernel": "ode"},
                "objective": {"kind": "nft"},
                "eval": {"eta": 0.5},
            }
        )


def test_each_kernel_has_its_authors_noise() -> None:
    found = {
        kernel: make_config(
            {"diffusion": {"process": "flow", "kernel": kernel}, "objective": {"kind": "nft"}}
        ).diffusion.eta
        for kernel in KERNELS
    }
    assert found == {"cps": 0.8, "flow": 0.7, "dance": 0.3, "ode": 0.0}


def test_the_scheduler_names_what_it_lacks() -> None:
    stock = FlowMatchEulerDiscreteScheduler(**SD35)
    with pytest.raises(ValueError, match="kernel 'sde' is not in"):
        SeededFlowScheduler.of(stock, kernel="sde")
    ours = SeededFlowScheduler.of(stock)
    ours.set_timesteps(3)
    x = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"2 samples, but generators\(seeds\) was called for 0"):
        ours.step(x, ours.timesteps[0], x)
    ours = SeededFlowScheduler.of(stock)
    ours.set_timesteps(3)
    ours.generators([1])
    with pytest.raises(ValueError, match="latent_size: needed for a pipeline that packs"):
        ours.step(torch.zeros(1, 16, 16), ours.timesteps[0], torch.zeros(1, 16, 16))
    ours = SeededFlowScheduler.of(stock, latent_size=(8, 4))
    ours.set_timesteps(3)
    ours.generators([1])
    with pytest.raises(ValueError, match="latent_size: 8 x 4 is not 16 x 4 latents"):
        ours.step(torch.zeros(1, 16, 16), ours.timesteps[0], torch.zeros(1, 16, 16))
