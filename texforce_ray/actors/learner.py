"""Learner actor: a thin shell around the learner. Heavy imports wait until it is created."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from texforce_ray.actors.messages import (
    Membership,
    Refs,
    Updated,
    UpdateTask,
    Whereabouts,
    whereabouts,
)
from texforce_ray.actors.rollout import quiet_libraries
from texforce_ray.actors.torch_trace import TorchTrace
from texforce_ray.artifacts.snapshot import Learned, LearnerState, PolicySnapshot
from texforce_ray.config import Config
from texforce_ray.errors import EffectError

if TYPE_CHECKING:
    from texforce_ray.model.backbone import Backbone
    from texforce_ray.rl.learner import Learner

# A report and the parts of `Learned`, each a separate object: rollout actors fetch only the
# snapshot. Of several learners, only the first publishes an update.
Published = tuple[Updated, PolicySnapshot | None, LearnerState | None, PolicySnapshot | None]

_HALF_PATIENCE = 10
PROFILED_STEPS = 2  # an update may take hours, and its profile fill all memory


def units_of(membership: Membership, samples: int, unit: int) -> slice:
    """The units of work, of `unit` samples each, that hold a learner's share of the samples."""
    share = samples // membership.size
    first, end = membership.rank * share, (membership.rank + 1) * share
    return slice(first // unit, -(-end // unit))


class LearnerActor:
    """Trains; what it returns is all that is needed to continue elsewhere."""

    def __init__(self, config: Config) -> None:
        import torch

        from texforce_ray.model.backbone import load_config_backbone

        quiet_libraries()
        torch.set_num_threads(config.learner.num_threads)
        self._begin(load_config_backbone(config, config.learner.num_gpus), config)

    def _begin(self, backbone: Backbone, config: Config) -> None:
        from texforce_ray.model.effect import EffectProbe
        from texforce_ray.model.flops import matmul_peak, pass_flops
        from texforce_ray.rl.objectives import make_learner

        self.config = config
        self._address: str | None = None
        self._ready = False  # a new process holds a version 0, but maybe not this run's
        self._pass_flops = pass_flops(backbone, decoder=config.direct is not None)
        self._peak_flops = matmul_peak(backbone.device, backbone.dtype)
        self.learner: Learner = make_learner(backbone, config)
        self._probe = EffectProbe(backbone)

    def ready(self) -> Whereabouts:
        """Where this actor runs, once it has started."""
        return whereabouts(self.learner.backbone.device)

    def meeting(self) -> str | None:
        """The address at which this learner has met the others, if it has."""
        return self._address

    def meeting_point(self) -> str:
        """A free address on this learner's machine, at which all learners can meet."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def initialize(self, learned: Refs, begin: Refs = ()) -> Published:
        """Start fresh or from what a learner published; publishes that version.

        Args:
            learned: the parts of `Learned` of the version to continue from; empty for a new run.
            begin: the snapshot of an adapter that a new run starts from; may be empty.
        """
        import ray

        if learned:
            self.learner.load(Learned(*ray.get(list(learned))))
        elif begin:
            self.learner.begin_from(ray.get(begin[0]))
        self._ready = True
        updated, learned = self._published(Updated({}))
        return updated, *learned

    def update(self, task: UpdateTask, membership: Membership = Membership()) -> Published:  # noqa: B008 - immutable
        """Train policy `version` to `version + 1`; repeating a call repeats its result.

        If this actor is not at that version, because it was restarted or its answer was lost, it
        continues from `task.learned`. Each of several learners fetches only the trajectories of
        its own shards.
        """
        import ray

        from texforce_ray.diffusion.trajectory import concatenate
        from texforce_ray.rl.sharding import UpdateBatch

        start = time.perf_counter()
        self._join(membership)
        if self.learner.version != task.version or not self._ready:
            self.learner.load(Learned(*ray.get(list(task.learned))))
            self._ready = True
        unit = self.config.rollout.batch_size
        own = units_of(membership, len(task.mask), unit)
        mine = concatenate(ray.get(list(task.trajectories[own])))
        fetched = time.perf_counter() - start
        batch = UpdateBatch(mine, task.advantages, task.mask, own.start * unit)
        policy = ray.get(task.behaviour[0]) if task.behaviour else None
        metrics, trace = self._profiled(task.version, lambda: self.learner.update(batch, policy))
        if membership.rank:
            return Updated({}), None, None, None
        costs = Updated(
            metrics,
            seconds=time.perf_counter() - start,
            fetch_seconds=fetched,
            flops=self.learner.update_flops(metrics, self._pass_flops),
            peak_flops=self._peak_flops * membership.size,
            trace=trace,
        )
        updated, learned = self._published(costs)
        return updated, *learned

    def _profiled(
        self, version: int, update: Callable[[], dict[str, float]]
    ) -> tuple[dict[str, float], bytes | None]:
        """The update's metrics, and torch's profile of its beginning, if requested."""
        with TorchTrace(version in self.config.profile) as trace:
            done = 0

            def after_step(*_: object) -> None:
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
        """Meet the others, unless that has already happened at this address."""
        from texforce_ray.rl.group import LearnerGroup, SoloGroup

        if membership.address == self._address:
            return
        self.learner.group.close()
        self.learner.group, self._address = SoloGroup(), None
        if membership.address is not None:
            device = self.learner.backbone.device
            # They meet before the pass over all samples, but exchange data only hours later.
            patience = self.config.learner.timeout_s
            self.learner.group = LearnerGroup(
                membership.address, membership.rank, membership.size, device, patience
            )
        self._address = membership.address

    def _published(self, updated: Updated) -> tuple[Updated, Learned]:
        learned = self.learner.learned()
        snapshot, effect = learned.snapshot, self._probe.measure(self.learner.adapter)
        size = effect.change + effect.denoiser
        # In half precision a small change may round to zero, but not that of many iterations.
        patience = 0 if self.config.model.dtype == "float32" else _HALF_PATIENCE
        if not size and snapshot.changes and snapshot.version >= patience:
            raise EffectError(
                f"training changes nothing: the adapter of policy version {snapshot.version} is "
                "not zero, yet it does not change a probe prompt's embedding; check that "
                "the target_modules in lora name layers that this model uses"
            )
        metrics = updated.metrics | {"learner/effect": size}
        return updated._replace(metrics=metrics, effect=effect), learned
