"""What all stages of pre-training share: the loop over steps, one optimizer step, the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from texforce_ray.shapes.batches import in_order
from texforce_ray.shapes.stages import Stage, laid_out_as

SHOW_EVERY = 20  # steps


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 where it does no harm: weights and optimizer stay in float32."""
    return torch.autocast(device.type, torch.bfloat16)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then cosine to one percent."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress))


def steps_of(
    stage: Stage, start: int, dataset: Dataset[Any], save_every: int, title: str
) -> Iterator[tuple[int, Any, tqdm]]:
    """`(step, its batch, the progress bar)`; the stage is saved in between and at the end."""
    steps = range(start, len(dataset))  # type: ignore[arg-type]
    batches = in_order(dataset, steps)
    with tqdm(initial=start, total=start + len(steps), desc=title, mininterval=5) as bar:
        for step, batch in zip(steps, batches, strict=True):
            yield step, batch, bar
            bar.update()
            if (step + 1) % save_every == 0 or step + 1 == steps.stop:
                stage.save(step + 1)


def update(
    optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], loss: Tensor, lr: float
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()  # before the next forward pass, which overwrites a CUDA graph's gradients


def resumed(stage: Stage, parameters: list[nn.Parameter], decay: float) -> tuple[int, EMAModel]:
    """The step from which a stage with averaged weights continues, and its averages."""
    averages = EMAModel(parameters, decay=decay, foreach=True)
    if start := stage.load():
        averages.shadow_params = [
            laid_out_as(parameter, stage.extra[f"ema.{i}"])
            for i, parameter in enumerate(parameters)
        ]
        averages.optimization_step = start
    return start, averages


def averaged(stage: Stage, averages: EMAModel, parameters: list[nn.Parameter]) -> None:
    """Add a step's weights to the averages, which the stage saves."""
    averages.step(parameters)
    stage.extra = {f"ema.{i}": p for i, p in enumerate(averages.shadow_params)}
