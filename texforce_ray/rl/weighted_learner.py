"""Denoising regression on the policy's own samples, the better ones with larger weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from texforce_ray.config import RaftObjective, RwrObjective
from texforce_ray.model.transfer import to_device
from texforce_ray.rl.forward import best_weights, exponential_weights
from texforce_ray.rl.forward_learner import ForwardLearner, Noised, PairLoss
from texforce_ray.rl.sharding import UpdateBatch


class WeightedLearner(ForwardLearner):
    """`rwr`: reward-weighted regression (Lee et al. 2023). `raft`: best of K (Dong et al. 2023)."""

    @property
    def trained_share(self) -> float:
        objective, samples = self.config.objective, self.config.prompts.samples_per_prompt
        if not isinstance(objective, RaftObjective) or self.anchor_weight or self.embedding_weight:
            return 1.0
        group = self.config.samples_per_iteration if samples == 1 else samples
        return objective.best / group

    def used(self, batch: UpdateBatch) -> np.ndarray:
        if self.anchor_weight or self.embedding_weight:  # they hold every sample
            return batch.mask
        return batch.mask & (self.sample_weights(batch) > 0)

    def sample_weights(self, batch: UpdateBatch) -> np.ndarray:
        """Of each of the iteration's samples, 1 on average over those of a prompt: float64 [N]."""
        objective, samples = self.config.objective, self.config.prompts.samples_per_prompt
        # With one sample per prompt, all of the iteration's compete; a measurement of batch sizes
        # has batches of any size.
        whole = samples == 1 or len(batch) % samples
        group = len(batch) if whole else samples
        if isinstance(objective, RaftObjective):
            return best_weights(batch.advantages, batch.mask, group, objective.best)
        assert isinstance(objective, RwrObjective)
        return exponential_weights(batch.advantages, batch.mask, group, objective.temperature)

    def pair_loss(self, batch: UpdateBatch, kept: np.ndarray) -> PairLoss:
        del kept
        weight = torch.from_numpy(self.sample_weights(batch)).float()

        def loss(noised: Noised, output: Tensor) -> Tensor:
            own = to_device(weight[noised.pairs.sample + batch.first], self.backbone.device)
            return own * noised.error(output)

        return loss
