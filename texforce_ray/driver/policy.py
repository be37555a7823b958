"""The driver's view of the policy: its version, refs to published snapshots, and copies of them."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import ObjectRef

from texforce_ray.actors.messages import Refs, Updated, UpdateTask
from texforce_ray.artifacts.snapshot import Effect, Learned, PolicySnapshot
from texforce_ray.config import Config
from texforce_ray.crew.crew import Crew
from texforce_ray.driver.collect import TrainingBatch, sample_again
from texforce_ray.records.checkpoint import Checkpoint
from texforce_ray.records.rescaled import reward_weights


@dataclass(frozen=True)
class Version:
    """A published policy: the ref that sampling uses, and what it refers to.

    The driver holds the value too, so a copy survives the loss of the learner's node.
    effect: as the learner measured it; None for a version loaded from a checkpoint.
    """

    ref: ObjectRef
    snapshot: PolicySnapshot
    effect: Effect | None = None


class Policy:
    """The current version and those that sampling may still use: the last k + 1."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.versions: dict[int, Version] = {}
        self.learned: tuple[Refs, Learned]  # of the current version: refs and values

    @property
    def version(self) -> int:
        return max(self.versions)

    @staticmethod
    async def start(crew: Crew, config: Config, checkpoint: Checkpoint | None) -> Policy:
        """Version 0 of a fresh learner, or the version of a checkpoint."""
        policy = Policy(config)
        for snapshot in checkpoint.snapshots[:-1] if checkpoint else ():
            policy.versions[snapshot.version] = Version(ray.put(snapshot), snapshot)
        learned = [ray.put(part) for part in checkpoint.learned] if checkpoint else []

        async def attempt() -> tuple[Updated, Refs, Learned]:
            begin = []
            if not checkpoint and config.lora.init is not None:
                begin = [await crew.load_policy([(1.0, Path(config.lora.init).expanduser())])]
            updated, refs = await crew.initialize(learned, begin)
            return updated, refs, Learned(*await crew.fetch(refs))

        policy._publish(*await crew.redo_if_lost(attempt))
        return policy

    @property
    def evaluated(self) -> Refs:
        """The ref of what is evaluated and exported: the averaged adapter if there is one."""
        snapshot, _, average = self.learned[0]
        return [snapshot if self.learned[1].average is None else average]

    async def update(
        self, crew: Crew, batch: TrainingBatch, before_publishing: Awaitable[None]
    ) -> Updated:
        """Train on `batch` and publish the next version; returns the learner's report."""
        sampled_with = batch.scored.policy_version
        behaviour = self.versions[sampled_with].ref
        trajectories: Refs = batch.scored.trajectories

        async def attempt() -> tuple[Updated, Refs, Learned]:
            nonlocal trajectories
            if not trajectories:  # some were lost with a node
                trajectories = await sample_again(crew, batch.scored.units, behaviour)
            given, trajectories = trajectories, ()
            task = UpdateTask(
                version=self.version,
                trajectories=list(given),
                advantages=batch.advantages,
                mask=batch.mask,
                learned=list(self.learned[0]),
                behaviour=[behaviour] if sampled_with != self.version else [],
            )
            updated, refs = await crew.update(task)
            return updated, refs, Learned(*await crew.fetch(refs))

        updated, refs, learned = await crew.redo_if_lost(attempt)
        await before_publishing
        self._publish(updated, refs, learned)
        return updated

    def _publish(self, updated: Updated, refs: Refs, learned: Learned) -> None:
        """Switch to a new version without awaiting, so that it is never half-published."""
        version = learned.snapshot.version
        self.learned = refs, learned
        self.versions[version] = Version(refs[0], learned.snapshot, updated.effect)
        # Sampling no longer uses older versions; dropping the references frees them.
        oldest = version - self.config.max_staleness
        self.versions = {v: held for v, held in self.versions.items() if v >= oldest}

    def checkpoint(self, prompt_statistics: dict[str, list[float]]) -> Checkpoint:
        """Everything that a resumed run needs."""
        snapshots = tuple(self.versions[version].snapshot for version in sorted(self.versions))
        learned, weights = self.learned[1], reward_weights(self.config)
        return Checkpoint(learned.state, snapshots, learned.average, prompt_statistics, weights)
