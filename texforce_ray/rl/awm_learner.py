"""Advantage-weighted matching: PPO whose log-probability is the negative denoising error."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from texforce_ray.artifacts.snapshot import PolicySnapshot
from texforce_ray.config import AwmObjective, Config
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.transfer import to_device
from texforce_ray.rl import ppo
from texforce_ray.rl.forward_learner import ForwardLearner, Noised, PairLoss
from texforce_ray.rl.sharding import UpdateBatch


class AwmLearner(ForwardLearner):
    """Xue et al. 2025, with log p := -error and its ratio to the policy before the update.

    That policy is the learner's own, whichever version sampled: like decoupled PPO's proximal one.
    """

    first_passes = 1
    sums = (*ForwardLearner.sums, "ratio", "clipped")

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        self._before: Tensor | None = None  # errors of the policy that the iteration started with
        self._seen = torch.zeros(2, dtype=torch.float64, device=backbone.device)

    def update(
        self, batch: UpdateBatch, behaviour: PolicySnapshot | None = None
    ) -> dict[str, float]:
        self._before = self._errors(batch)
        try:
            return super().update(batch, behaviour)
        finally:
            self._before = None

    def _errors(self, batch: UpdateBatch) -> Tensor:
        """Errors of this learner's unmasked samples under the current weights: float32 [n, K]."""
        count = len(batch.trajectory)
        errors = torch.zeros(0, device=self.backbone.device)
        for shard in self._shards(np.arange(len(batch))):
            kept = shard[batch.mask[shard]]
            if not len(kept):
                continue
            for noised, output in self.outputs(batch, kept):
                found = noised.error(output)
                if not errors.numel():
                    errors = found.new_zeros(count, self.levels)
                errors[self._places(noised)] = found
        return errors

    def _places(self, noised: Noised) -> tuple[Tensor, Tensor]:
        """Indices of pairs into errors [n, K]."""
        device = self.backbone.device
        return to_device(noised.pairs.sample, device), to_device(noised.place, device)

    def shard_gradient(
        self, batch: UpdateBatch, kept: np.ndarray, valid: int
    ) -> tuple[list[Tensor], dict[str, float]]:
        self._seen.zero_()
        gradient, sums = super().shard_gradient(batch, kept, valid)
        ratio, clipped = self._seen.tolist()
        return gradient, sums | {"ratio": ratio, "clipped": clipped}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        count = max(1.0, sums["count"])
        own = {"forward/ratio": sums["ratio"] / count, "forward/clipfrac": sums["clipped"] / count}
        return super().metrics(sums) | own

    def pair_loss(self, batch: UpdateBatch, kept: np.ndarray) -> PairLoss:
        del kept
        objective, before, device = self.config.objective, self._before, self.backbone.device
        assert isinstance(objective, AwmObjective)
        assert before is not None

        def loss(noised: Noised, output: Tensor) -> Tensor:
            sample = noised.pairs.sample
            advantages = torch.from_numpy(batch.advantages[sample + batch.first])
            advantage = to_device(advantages.float(), device)
            old = before[self._places(noised)]
            new = noised.error(output)
            result = ppo.clipped_loss(-new, -old, advantage, objective.clip_range)
            self._seen += torch.stack([result.ratio.sum(), result.clipped.sum()])
            return result.loss

        return loss
