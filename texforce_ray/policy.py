"""The driver's view of the policy: versions, references to their snapshots, and a copy to keep."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef

from texforce_ray.actors.crew import Crew
from texforce_ray.collect import TrainingBatch, sample_again
from texforce_ray.config import Config
from texforce_ray.model.snapshot import Effect
from texforce_ray.records.checkpoint import Checkpoint
from texforce_ray.records.rescaled import reward_weights


class Policy:
    """The current version, and the snapshots that sampling may still name (the last k + 1)."""

    def __init__(self, config: Config, version: int, refs: Sequence[ObjectRef]) -> None:
        self.config, self.version = config, version
        self.state, snapshot, self._evaluated = refs
        self.snapshots: dict[int, ObjectRef] = {version: snapshot}
        # What the learner says of each version; unknown of one that a checkpoint brought.
        self.effects: dict[int, Effect | None] = {}
        # Of each version, the values: a copy on the driver's node outlives the learner's.
        self._held: dict[int, list[Any]] = {}

    @staticmethod
    async def start(crew: Crew, config: Config, checkpoint: Checkpoint | None) -> Policy:
        """Version 0 of a fresh learner, or the version of a checkpoint."""
        state = [ray.put(checkpoint.state)] if checkpoint else []

        async def attempt() -> Policy:
            begin = []
            if not checkpoint and config.lora.init is not None:
                begin = [await crew.load_policy([(1.0, Path(config.lora.init).expanduser())])]
            facts, refs = await crew.initialize(state, begin)
            policy = Policy(config, checkpoint.iteration if checkpoint else 0, refs)
            policy.effects[policy.version] = facts.get("effect")
            policy._held[policy.version] = await crew.fetch(refs)
            return policy

        policy = await crew.redo_if_lost(attempt)
        for snapshot in checkpoint.snapshots if checkpoint else ():
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
        behaviour = self.snapshots[sampled_with]
        known = [batch.scored.trajectories]

        async def attempt() -> tuple[dict[str, Any], tuple[ObjectRef, ...], list[Any]]:
            if not known:  # a node took some of them along
                known.append(await sample_again(crew, batch.scored.units, behaviour))
            metrics, refs = await crew.update(
                self.version,
                known.pop(),
                batch.advantages,
                batch.mask,
                self.state,
                [behaviour] if stale else [],
            )
            return metrics, refs, await crew.fetch(refs)

        metrics, refs, held = await crew.redo_if_lost(attempt)
        self.state, snapshot, self._evaluated = refs
        # Nothing is awaited from here on: the version is either the old one or whole.
        self.version += 1
        self.snapshots[self.version] = snapshot
        self.effects[self.version] = metrics.get("effect")
        self._held[self.version] = held
        # Nothing still to be sampled names an older one; dropping the reference frees it.
        oldest = max(0, self.version - self.config.max_staleness)
        self.snapshots = {v: ref for v, ref in self.snapshots.items() if v >= oldest}
        self.effects = {v: effect for v, effect in self.effects.items() if v >= oldest}
        self._held = {v: values for v, values in self._held.items() if v >= oldest}
        return metrics

    async def checkpoint(self, prompt_statistics: dict[str, list[float]]) -> Checkpoint:
        """Fetch everything that a resumed run needs."""
        refs = [self.state, *self.snapshots.values(), self.evaluated[0]]
        state, *snapshots, evaluated = await asyncio.gather(
            *(asyncio.wrap_future(ref.future()) for ref in refs)
        )
        weights = reward_weights(self.config)
        return Checkpoint(state, tuple(snapshots), evaluated, prompt_statistics, weights)
