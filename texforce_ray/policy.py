"""The driver's view of the policy: versions and references to their snapshots, no tensors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray import ObjectRef

from texforce_ray.actors.crew import Crew
from texforce_ray.collect import TrainingBatch
from texforce_ray.config import Config
from texforce_ray.records.checkpoint import Checkpoint


class Policy:
    """The current version, and the snapshots that sampling may still name (the last k + 1)."""

    def __init__(self, config: Config, version: int, refs: Sequence[ObjectRef]) -> None:
        self.config, self.version = config, version
        self.state, snapshot, self._evaluated = refs
        self.snapshots: dict[int, ObjectRef] = {version: snapshot}

    @staticmethod
    async def start(crew: Crew, config: Config, checkpoint: Checkpoint | None) -> Policy:
        """Version 0 of a fresh learner, or the version of a checkpoint."""
        if checkpoint is None:
            return Policy(config, 0, await crew.initialize([]))
        state = ray.put(checkpoint.state)
        refs = await crew.initialize([state])
        policy = Policy(config, checkpoint.iteration, refs)
        for snapshot in checkpoint.snapshots:
            if snapshot.version != policy.version:
                policy.snapshots[snapshot.version] = ray.put(snapshot)
        return policy

    @property
    def evaluated(self) -> list[ObjectRef]:
        """The snapshot to evaluate and export: the averaged adapter if there is one."""
        if self.config.optimizer.ema_decay:
            return [self._evaluated]
        return [self.snapshots[self.version]]

    async def update(self, crew: Crew, batch: TrainingBatch) -> dict[str, Any]:
        """Train on `batch` and publish the next version; returns the learner's metrics."""
        sampled_with = batch.scored.policy_version
        stale = sampled_with != self.version
        metrics, (state, snapshot, evaluated) = await crew.update(
            self.version,
            batch.scored.trajectories,
            batch.advantages,
            batch.mask,
            self.state,
            [self.snapshots[sampled_with]] if stale else [],
        )
        self.state, self._evaluated = state, evaluated
        # Nothing is awaited from here on: the version is either the old one or whole.
        self.version += 1
        self.snapshots[self.version] = snapshot
        # Nothing still to be sampled names an older one; dropping the reference frees it.
        oldest = max(0, self.version - self.config.max_staleness)
        self.snapshots = {v: ref for v, ref in self.snapshots.items() if v >= oldest}
        return metrics

    async def checkpoint(self, prompt_statistics: dict[str, list[float]]) -> Checkpoint:
        """Fetch everything that a resumed run needs."""
        refs = [self.state, *self.snapshots.values(), self.evaluated[0]]
        state, *snapshots, evaluated = await asyncio.gather(
            *(asyncio.wrap_future(ref.future()) for ref in refs)
        )
        return Checkpoint(state, tuple(snapshots), evaluated, prompt_statistics)
