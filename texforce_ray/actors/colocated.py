"""One actor for both roles: rollout and learner take turns on one device and one set of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from texforce_ray.actors.learner import LearnerActor, Updated
from texforce_ray.actors.rollout import RolloutActor
from texforce_ray.config import Config

if TYPE_CHECKING:
    from ray import ObjectRef


class ColocatedActor(RolloutActor, LearnerActor):
    """Samples with the learner's own networks; the learner's weights are put back after."""

    def __init__(self, config: Config) -> None:
        RolloutActor.__init__(self, config)
        self._begin(self.backbone, config)

    def update(self, *given: Any) -> Updated:
        import torch

        torch.set_num_threads(self.config.learner.num_threads)
        try:
            return LearnerActor.update(self, *given)
        finally:
            torch.set_num_threads(self.config.rollout.num_threads)

    @contextmanager
    def _policy(self, policy: Sequence[ObjectRef]) -> Iterator[None]:
        import ray

        adapter = self.learner.adapter
        if not policy:
            with adapter.disabled():
                yield
            return
        own, wanted = self.learner.snapshot(), policy[0].hex()
        try:  # whatever fails, the learner must have its weights back
            adapter.load(ray.get(policy[0]))
            if wanted != self._loaded:
                self._effect = self._probe.measure(adapter)
                self._loaded = wanted
            yield
        finally:
            adapter.load(own)
