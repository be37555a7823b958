"""One actor for both roles: rollout and learner take turns on one device and one set of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from texforce_ray.actors.learner import LearnerActor, Published
from texforce_ray.actors.messages import Membership, Refs, UpdateTask
from texforce_ray.actors.rollout import RolloutActor
from texforce_ray.config import Config


class ColocatedActor(RolloutActor, LearnerActor):
    """Samples with the learner's own networks; the learner's weights are restored afterwards."""

    def __init__(self, config: Config) -> None:
        RolloutActor.__init__(self, config)
        self._begin(self.backbone, config)

    def update(self, task: UpdateTask, membership: Membership = Membership()) -> Published:  # noqa: B008 - immutable
        import torch

        torch.set_num_threads(self.config.learner.num_threads)
        try:
            return LearnerActor.update(self, task, membership)
        finally:
            torch.set_num_threads(self.config.rollout.num_threads)

    @contextmanager
    def _policy(self, policy: Refs) -> Iterator[None]:
        import ray

        adapter = self.learner.adapter
        if not policy:
            with adapter.disabled():
                yield
            return
        own, wanted = adapter.snapshot(self.learner.version), policy[0].hex()
        try:  # whatever fails, the learner must get its weights back
            adapter.load_weights(ray.get(policy[0]).adapters)
            if wanted != self._loaded:
                self._effect = self._probe.measure(adapter)
                self._loaded = wanted
            yield
        finally:
            adapter.load_weights(own.adapters)
