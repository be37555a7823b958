"""Learner actor: a thin shell around the learner. Heavy imports wait until it is made."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from texforce_ray.actors.rollout import quiet_libraries
from texforce_ray.config import Config
from texforce_ray.model.snapshot import LearnerState, PolicySnapshot

if TYPE_CHECKING:
    from ray import ObjectRef

    from texforce_ray.model.backbone import Backbone
    from texforce_ray.rl.trainer import Trainer

Updated = tuple[dict[str, Any], LearnerState, PolicySnapshot, PolicySnapshot]


class LearnerActor:
    """Trains; what it returns is all that is needed to go on elsewhere."""

    def __init__(self, config: Config) -> None:
        import torch

        from texforce_ray.model.backbone import load_config_backbone

        quiet_libraries()
        torch.set_num_threads(config.learner.num_threads)
        self.learner = _learner(load_config_backbone(config.model, config.learner.num_gpus), config)

    def ready(self) -> str:
        """Device and process, for log messages."""
        return f"{self.learner.backbone.device}, pid {os.getpid()}"

    def initialize(self, state: Sequence[ObjectRef]) -> Updated:
        """Start fresh, or from the state that `state[0]` refers to; publishes that version."""
        import ray

        if state:
            self.learner.load(ray.get(state[0]))
        return self._published({})

    def update(
        self,
        version: int,
        trajectories: Sequence[ObjectRef],
        advantages: np.ndarray,
        mask: np.ndarray,
        state: Sequence[ObjectRef],
        behaviour: Sequence[ObjectRef],
    ) -> Updated:
        """Train policy `version` to `version + 1`; repeating a call repeats its result.

        Whatever this actor did before, it goes on from `state` if it is not at `version`: a
        restarted actor, or one whose answer was lost.
        """
        import ray

        from texforce_ray.diffusion.trajectory import concatenate
        from texforce_ray.rl.trainer import UpdateBatch

        start = time.perf_counter()
        if self.learner.version != version:
            self.learner.load(ray.get(state[0]))
        batch = UpdateBatch(concatenate(ray.get(list(trajectories))), advantages, mask)
        metrics = self.learner.update(batch, ray.get(behaviour[0]) if behaviour else None)
        return self._published(metrics | {"seconds": time.perf_counter() - start})

    def _published(self, metrics: dict[str, Any]) -> Updated:
        learner = self.learner
        return metrics, learner.state(), learner.snapshot(), learner.evaluation_snapshot()


def _learner(backbone: Backbone, config: Config) -> Trainer:
    """PPO, or backpropagation through the rewards, which then live here."""
    if config.direct is None:
        from texforce_ray.rl.learner import Learner

        return Learner(backbone, config)
    from texforce_ray.rewards.differentiable import total_of
    from texforce_ray.rl.direct import DirectLearner

    return DirectLearner(backbone, config, total_of(config.rewards, backbone.device.type))
