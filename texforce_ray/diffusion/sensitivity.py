"""How steeply each step's likelihood depends on the network: a check of a schedule before it runs.

Where |d mean / d output| / sigma is large, a rounding error or the smallest change of the policy
moves the likelihood further than PPO's clip range, and the gradient there is noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from texforce_ray.diffusion.flow import Flow
from texforce_ray.diffusion.process import Process
from texforce_ray.errors import ConfigError

MOST = 10.0  # of a flow's trained steps; SD 3.5's last step but one has 32 with cps
UNEVEN = 4.0  # times the median of the trained steps


def check_trained(process: Process, trained: Sequence[int]) -> None:
    """Reject steps of a flow that PPO cannot train on.

    Args:
        process: the whole process, without a window.
        trained: the steps that may be trained.

    Raises:
        ConfigError: names the steps, and what would leave them out.
    """
    if not trained:
        raise ConfigError(
            f"diffusion.window: the noise of none of its steps gives a likelihood; those of this "
            f"model's {len(process)} steps that do are {process.trainable}"
        )
    values = process.sensitivity().tolist()
    steep = [i for i in trained if values[i] > MOST]
    if steep and isinstance(process, Flow):
        raise ConfigError(
            f"diffusion: PPO would train on step{'s' * (len(steep) > 1)} "
            f"{', '.join(map(str, steep))} of {len(process)}, whose likelihood depends "
            f"{values[steep[0]]:.3g} times as steeply on the network as its noise is large (at "
            f"most {MOST:g} is allowed): its gradient is noise; train on earlier steps with "
            "diffusion.window={} or objective.timestep_choice=first"
        )


def table(process: Process, trained: Sequence[int]) -> list[str]:
    """Lines for people: each step's sensitivity, which are trained, and a warning if needed."""
    values = process.sensitivity().tolist()
    lines = [f"sensitivity of each step's likelihood, {len(values)} steps (* may be trained):"]
    cells = [f"{i}: {_number(v)}{'*' * (i in trained)}" for i, v in enumerate(values)]
    lines += [f"  {'  '.join(cells[i : i + 10])}" for i in range(0, len(cells), 10)]
    if not trained:
        return lines
    median = float(torch.tensor([values[i] for i in trained]).median())
    uneven = [i for i in trained if values[i] > UNEVEN * median]
    if uneven:
        lines.append(
            f"warning: step{'s' * (len(uneven) > 1)} {', '.join(map(str, uneven))}: more than "
            f"{UNEVEN:g} times the median: most of the likelihood's gradient comes from there, and "
            "little of it concerns the image; consider objective.timestep_choice=first or "
            "diffusion.window"
        )
    return lines


def _number(value: float) -> str:
    return "-" if value == float("inf") else f"{value:.2g}"
