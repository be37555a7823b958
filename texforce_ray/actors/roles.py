"""What an actor of each role must have: the contract between a crew and its actors.

`RolloutActor`, `LearnerActor`, `ColocatedActor` and `RewardServer` do the work; the stand-ins of
`texforce_ray.testing` and classes of your own may take their place (`train(config, roles=...)`).
Every method is called through Ray; each element of a returned tuple is a separate object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from texforce_ray.actors.colocated import ColocatedActor
from texforce_ray.actors.learner import LearnerActor, Published
from texforce_ray.actors.messages import (
    ImagePayload,
    Membership,
    Refs,
    SampleInfo,
    Scores,
    ScoringTask,
    UpdateTask,
    Whereabouts,
    WorkUnit,
)
from texforce_ray.actors.reward import RewardServer
from texforce_ray.actors.rollout import RolloutActor
from texforce_ray.artifacts.snapshot import PolicySnapshot

# How many objects a call of these methods gives; all others give one.
RETURNS = {"sample": 3, "generate": 2, "load_policy": 2, "initialize": 4, "update": 4}


class Rollout(Protocol):
    """Draws with the policy that each task names, a snapshot ref; without one, the base model."""

    def ready(self) -> Whereabouts:
        """Where it runs, once it has started."""

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the encoder's limit."""

    def sample(self, unit: WorkUnit, policy: Refs) -> tuple[SampleInfo, Any, ImagePayload]:
        """Facts, trajectory and images of a unit of work: the same bits for the same unit."""

    def generate(
        self, prompts: Sequence[str], seeds: np.ndarray, policy: Refs, guidance_scale: float
    ) -> tuple[SampleInfo, ImagePayload]:
        """Facts, with `looks`, and images for an evaluation."""

    def export(self, policy: Refs) -> dict[str, bytes]:
        """The adapter's files by name."""

    def load_policy(
        self, adapters: Sequence[tuple[float, str, dict[str, bytes]]]
    ) -> tuple[None, PolicySnapshot]:
        """The weighted sum of exported adapters: (weight, name for errors, files) each."""


class Learner(Protocol):
    """Trains; what it publishes is all that another learner needs to continue."""

    def ready(self) -> Whereabouts:
        """Where it runs, once it has started."""

    def meeting(self) -> str | None:
        """The address at which it has met the other learners, if it has."""

    def meeting_point(self) -> str:
        """An address at which all learners can meet."""

    def initialize(self, learned: Refs, begin: Refs = ()) -> Published:
        """Start fresh, from an adapter, or from what was published; publishes that version."""

    def update(self, task: UpdateTask, membership: Membership) -> Published:
        """Train one version to the next; repeating a call repeats its result."""


class RolloutLearner(Rollout, Learner, Protocol):
    """Both in one, with one copy of the frozen weights, for `learner.colocated`."""


class RewardScorer(Protocol):
    """Scores images with one reward."""

    def ready(self) -> Whereabouts:
        """Where it runs, once it has started."""

    def memory(self) -> dict[str, float]:
        """Peak memory in MB, by kind."""

    def score(self, tasks: Sequence[ScoringTask], *payloads: ImagePayload) -> list[Scores]:
        """Scores for each task; a failure of the reward is data, not an exception."""


@dataclass(frozen=True)
class Roles:
    """The classes that a crew starts."""

    rollout: type[Rollout] = RolloutActor
    learner: type[Learner] = LearnerActor
    both: type[RolloutLearner] = ColocatedActor
    reward: type[RewardScorer] = RewardServer
