"""How learners share a minibatch: fixed shards, and the exchange of their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from texforce_ray import randomness
from texforce_ray.config import Config
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.group import SoloGroup


@dataclass(frozen=True)
class UpdateBatch:
    """One iteration's data: float64 [N] advantages, bool [N] mask (True: use), trajectories.

    Each of several learners holds only the trajectories of its own shards: those of the samples
    from `first` on. Samples are still numbered from 0 to N - 1.
    """

    trajectory: Trajectory
    advantages: np.ndarray
    mask: np.ndarray
    first: int = 0

    def __len__(self) -> int:
        return len(self.mask)


class Sharding:
    """The part of a learner that knows about other learners: which samples are its own."""

    config: Config
    backbone: Backbone
    parameters: list[nn.Parameter]
    version: int
    group: SoloGroup

    def _own_shards(self) -> int:
        return self.config.learner.gradient_shards // self.group.size

    def _minibatches(self, batch: UpdateBatch, epoch: int) -> list[np.ndarray]:
        config = self.config
        return randomness.minibatches(
            config.seed,
            self.version,
            epoch,
            len(batch),
            config.update.minibatches,
            config.learner.gradient_shards,
        )

    def _shards(self, rows: np.ndarray) -> list[np.ndarray]:
        """The parts of `rows` (of a minibatch, or of all samples) that this learner computes.

        Parts and order are fixed, so gradients sum to the same bits on any number of learners.
        """
        shards = np.split(rows, self.config.learner.gradient_shards)
        own = len(shards) // self.group.size
        return shards[self.group.rank * own : (self.group.rank + 1) * own]

    def _gradient(self, parts: Sequence[Sequence[Tensor] | None]) -> list[Tensor]:
        """The sum over all learners' shards; a part is None if its whole shard is masked."""
        nothing = [torch.zeros_like(p) for p in self.parameters]
        own = torch.stack([torch.cat([t.reshape(-1) for t in part or nothing]) for part in parts])
        total = self.group.sum(own)
        sizes = [p.numel() for p in self.parameters]
        pieces = zip(total.split(sizes), self.parameters, strict=True)
        return [piece.view_as(p) for piece, p in pieces]

    def _gathered(self, own: Sequence[Sequence[float]]) -> np.ndarray:
        """The rows of all shards, float64 [S, M], from one row of numbers for each own shard."""
        device = self.backbone.device
        return (
            self.group.gather(torch.tensor(own, dtype=torch.float64, device=device)).cpu().numpy()
        )
