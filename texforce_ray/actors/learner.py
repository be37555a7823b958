"""Learner actor: a thin shell around the learner. Heavy imports wait until it is made."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from texforce_ray.actors.messages import whereabouts
from texforce_ray.actors.rollout import quiet_libraries
from texforce_ray.actors.torch_trace import TorchTrace
from texforce_ray.config import Config
from texforce_ray.errors import EffectError
from texforce_ray.model.snapshot import LearnerState, PolicySnapshot

if TYPE_CHECKING:
    from ray import ObjectRef

    from texforce_ray.model.backbone import Backbone
    from texforce_ray.rl.trainer import Trainer

Updated = tuple[dict[str, Any], LearnerState | None, PolicySnapshot | None, PolicySnapshot | None]


_HALF_PATIENCE = 10
PROFILED_STEPS = 2  # an update may take hours, and its profile all memory


class Membership(NamedTuple):
    """A learner's place among those that work on one update together."""

    rank: int = 0
    size: int = 1
    address: str | None = None


def units_of(membership: Membership, samples: int, unit: int) -> slice:
    """The units of work, of `unit` samples each, that hold a learner's share of the samples."""
    share = samples // membership.size
    first, end = membership.rank * share, (membership.rank + 1) * share
    return slice(first // unit, -(-end // unit))


class LearnerActor:
    """Trains; what it returns is all that is needed to go on elsewhere."""

    def __init__(self, config: Config) -> None:
        import torch

        from texforce_ray.model.backbone import load_config_backbone

        quiet_libraries()
        torch.set_num_threads(config.learner.num_threads)
        self._begin(load_config_backbone(config, config.learner.num_gpus), config)

    def _begin(self, backbone: Backbone, config: Config) -> None:
        from texforce_ray.model.effect import EffectProbe
        from texforce_ray.model.flops import matmul_peak, pair_flops

        self.config = config
        self._address: str | None = None
        self._ready = False  # a new process holds version 0, but maybe not this run's
        self._pair_flops = pair_flops(backbone, config.diffusion.guidance_scale)
        self._peak_flops = matmul_peak(backbone.device, backbone.dtype)
        self.learner = _learner(backbone, config)
        self._probe = EffectProbe(backbone)

    def ready(self) -> str:
        """Device and process, for log messages."""
        return whereabouts(self.learner.backbone.device)

    def meeting(self) -> str | None:
        """Where this learner has met the others, if it has."""
        return self._address

    def meeting_point(self) -> str:
        """A free address on this learner's machine, for all of them to meet at."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def initialize(self, state: Sequence[ObjectRef], begin: Sequence[ObjectRef] = ()) -> Updated:
        """Start fresh, or from the state that `state[0]` refers to; publishes that version.

        `begin[0]` refers to the snapshot of an adapter that a fresh learner starts from.
        """
        import ray

        if state:
            self.learner.load(ray.get(state[0]))
        elif begin:
            self.learner.begin_from(ray.get(begin[0]))
        self._ready = True
        return self._published({})

    def update(
        self,
        version: int,
        trajectories: Sequence[ObjectRef],
        advantages: np.ndarray,
        mask: np.ndarray,
        state: Sequence[ObjectRef],
        behaviour: Sequence[ObjectRef],
        membership: Membership = Membership(),  # noqa: B008 - immutable
    ) -> Updated:
        """Train policy `version` to `version + 1`; repeating a call repeats its result.

        Whatever this actor did before, it goes on from `state` if it is not at `version`: a
        restarted actor, or one whose answer was lost. Of several learners each fetches only the
        trajectories of its own shards, and the first one publishes.
        """
        import ray

        from texforce_ray.diffusion.trajectory import concatenate
        from texforce_ray.rl.trainer import UpdateBatch

        start = time.perf_counter()
        self._join(membership)
        if self.learner.version != version or not self._ready:
            self.learner.load(ray.get(state[0]))
            self._ready = True
        unit = self.config.rollout.batch_size
        own = units_of(membership, len(mask), unit)
        mine = concatenate(ray.get(list(trajectories[own])))
        fetched = time.perf_counter() - start
        batch = UpdateBatch(mine, advantages, mask, own.start * unit)
        policy = ray.get(behaviour[0]) if behaviour else None
        metrics, trace = self._profiled(version, lambda: self.learner.update(batch, policy))
        seconds = time.perf_counter() - start
        if membership.rank:
            return {}, None, None, None
        return self._published(
            metrics
            | {
                "seconds": seconds,
                "fetch_seconds": fetched,
                "flops": metrics.get("ppo/trained_pairs", 0) * self._pair_flops,
                "peak_flops": self._peak_flops * membership.size,
                "trace": trace,
            }
        )

    def _profiled(self, version: int, update: Callable[[], dict]) -> tuple[dict, bytes | None]:
        """The update's metrics, and torch's profile of its beginning where it is asked for."""
        with TorchTrace(version in self.config.profile) as trace:
            done = 0

            def after_step(*_: Any) -> None:
                nonlocal done
                done += 1
                if done == PROFILED_STEPS:
                    trace.stop()

            hook = self.learner.optimizer.register_step_post_hook(after_step)
            try:
                metrics = update()
            finally:
                hook.remove()
        return metrics, trace.data

    def _join(self, membership: Membership) -> None:
        """Meet the others, if this is not where that has happened already."""
        from texforce_ray.rl.group import Alone, Together

        if membership.address == self._address:
            return
        self.learner.group.close()
        self.learner.group, self._address = Alone(), None
        if membership.address is not None:
            device = self.learner.backbone.device
            # They meet before the pass over all samples and exchange only after it: hours later.
            patience = self.config.learner.timeout_s
            self.learner.group = Together(
                membership.address, membership.rank, membership.size, device, patience
            )
        self._address = membership.address

    def _published(self, metrics: dict[str, Any]) -> Updated:
        learner = self.learner
        effect, snapshot = self._probe.measure(learner.adapter), learner.snapshot()
        metrics |= {"effect": effect, "learner/effect": effect.change + effect.denoiser}
        nothing = not effect.change and not effect.denoiser and snapshot.changes
        # In half precision a small change rounds to none, but not that of many iterations.
        patience = 0 if self.config.model.dtype == "float32" else _HALF_PATIENCE
        if nothing and snapshot.version >= patience:
            raise EffectError(
                f"training changes nothing: the adapter of policy version {snapshot.version} is "
                "not zero, and yet it leaves a probe prompt's embedding as it is (lora."
                "target_modules: are they layers that this model computes?)"
            )
        return metrics, learner.state(), snapshot, learner.evaluation_snapshot()


def _learner(backbone: Backbone, config: Config) -> Trainer:
    """PPO, or backpropagation through the rewards, which then live here."""
    if config.direct is None:
        from texforce_ray.rl.learner import Learner

        return Learner(backbone, config)
    from texforce_ray.rewards.differentiable import total_of
    from texforce_ray.rl.direct import DirectLearner

    return DirectLearner(backbone, config, total_of(config.rewards, backbone.device.type))
