"""Flow matching as a Markov decision process: Flow-CPS, Flow-SDE, DanceGRPO's SDE, and the ODE.

With noise levels s from 1 to 0, a latent is x_s = (1 - s) x0 + s noise and the network's output is
the velocity v = noise - x0. Every kernel's mean is linear, c_x x + c_v v, so it is two numbers for
each step, computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from texforce_ray.diffusion.process import Process, per_sample

KERNELS = ("cps", "flow", "dance", "ode")


@dataclass(frozen=True)
class Flow(Process):
    """levels: noise levels, [T + 1], the last one 0. c_x, c_v: coefficients of the means, [T].

    noisy: the steps at which noise is drawn, even where its deviation is 0.
    """

    timesteps: Tensor
    levels: Tensor
    c_x: Tensor
    c_v: Tensor
    sigma: Tensor
    noisy: tuple[int, ...]

    step_noise_dtype = torch.float32

    @staticmethod
    def of(timesteps: Tensor, levels: Tensor, kernel: str, eta: float) -> Flow:
        """The process on a scheduler's own timesteps [T] and noise levels [T + 1].

        Args:
            timesteps: the network's inputs.
            levels: `scheduler.sigmas` after `set_timesteps`: never computed again, as schedulers
                shift them in ways of their own.
            kernel: 'cps' (Wang & Yu 2025, Flow-CPS), 'flow' (Liu et al. 2025, Flow-GRPO, section
                4), 'dance' (Xue et al. 2025, DanceGRPO) or 'ode'.
            eta: how much noise: a of the first two, eta of the third.

        Raises:
            ValueError: the kernel is unknown, or the levels do not descend to 0.
        """
        s = levels.double()
        if len(s) != len(timesteps) + 1 or s[-1] != 0 or (s.diff() >= 0).any():
            raise ValueError(f"noise levels {levels.tolist()} do not descend to 0")
        steps = len(timesteps)
        noisy = eta > 0 and kernel != "ode"
        numbers = [coefficients(s, i, kernel if noisy else "ode", eta) for i in range(steps)]
        c_x, c_v, sigma = torch.tensor(numbers, dtype=torch.float64).float().T.contiguous()
        return Flow(
            timesteps.float().cpu(),
            levels.float().cpu(),
            c_x,
            c_v,
            sigma,
            tuple(range(steps)) if noisy else (),
        )

    @property
    def draws(self) -> Sequence[int]:
        return self.noisy

    def windowed(self, steps: Sequence[int]) -> Flow:
        inside = torch.zeros(len(self), dtype=torch.bool, device=self.sigma.device)
        inside[list(steps)] = True
        inside &= torch.isin(
            torch.arange(len(self), device=inside.device),
            torch.tensor(self.noisy, device=inside.device, dtype=torch.long),
        )
        dt = (self.levels[1:].double() - self.levels[:-1].double()).float()
        return replace(
            self,
            c_x=torch.where(inside, self.c_x, torch.ones_like(self.c_x)),
            c_v=torch.where(inside, self.c_v, dt),
            sigma=torch.where(inside, self.sigma, torch.zeros_like(self.sigma)),
            noisy=tuple(i for i in self.noisy if i in set(steps)),
        )

    def to(self, device: torch.device) -> Flow:
        names = ("timesteps", "levels", "c_x", "c_v", "sigma")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def x0(self, step: Tensor, x: Tensor, output: Tensor) -> Tensor:
        return x - per_sample(self.levels, step, x) * output

    def mean(self, step: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """c_x x + c_v v; outside windows x + v dt, in the order of stock Euler steps."""
        c_x, c_v = (per_sample(c, step, x) for c in (self.c_x, self.c_v))
        return c_x * x + c_v * output

    def forward(self, step: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        level = per_sample(self.levels, step, x0)
        return (1 - level) * x0 + level * noise

    def target(self, step: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        del step
        return noise - x0


def coefficients(levels: Tensor, step: int, kernel: str, eta: float) -> tuple[float, float, float]:
    """(c_x, c_v, sigma) of a step in float64: its mean is c_x x + c_v v, sigma its deviation.

    Raises:
        ValueError: an unknown kernel.
    """
    s, after = float(levels[step]), float(levels[step + 1])
    dt = after - s
    if kernel == "ode":
        return 1.0, dt, 0.0
    if kernel == "cps":
        # (1 - s') x0 + s' (cos(a pi/2) x1 + sin(a pi/2) noise): exactly on the next level.
        cos, sin = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
        return (1 - after) + after * cos, after * cos * (1 - s) - (1 - after) * s, after * sin
    if kernel == "flow":
        # At s = 1 the deviation would be infinite; the second level takes its place there.
        below = float(levels[1]) if s == 1 else s
        squared = eta**2 * s / (1 - below)
        return (
            1 + squared / (2 * s) * dt,
            (1 + squared * (1 - s) / (2 * s)) * dt,
            math.sqrt(squared * -dt),
        )
    if kernel == "dance":
        half = 0.5 * eta**2 / s
        return 1 + half * dt, (1 + half * (1 - s)) * dt, eta * math.sqrt(-dt)
    raise ValueError(f"kernel {kernel!r} is not in {KERNELS}")
