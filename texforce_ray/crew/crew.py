"""All actors of a run: starts them, hands them work by role, stops them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group

from texforce_ray.actors.messages import (
    ImagePayload,
    Membership,
    Refs,
    SampleInfo,
    Updated,
    UpdateTask,
    WorkUnit,
    unpack_images,
)
from texforce_ray.actors.roles import Roles
from texforce_ray.artifacts.location import adapter_files
from texforce_ray.cluster.answers import gather, readable
from texforce_ray.cluster.placement import in_bundle, pack_learners
from texforce_ray.config import Config
from texforce_ray.crew.budget import Budget
from texforce_ray.crew.member import Member
from texforce_ray.crew.pool import ActorPool, SubmitRank
from texforce_ray.crew.starting import reward_pool, start_actor
from texforce_ray.errors import LostObjectError

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Admission(asyncio.Semaphore):
    """A semaphore that counts how many are waiting and how many are inside."""

    waiting = inside = 0

    async def acquire(self) -> Literal[True]:
        self.waiting += 1
        try:
            await super().acquire()
        finally:
            self.waiting -= 1
        self.inside += 1
        return True

    def release(self) -> None:
        self.inside -= 1
        super().release()


class Crew:
    """Rollout actors, reward servers and a learner, behind methods named for what they do.

    Await `wait_for_room` first: actors without room would wait silently.
    """

    def __init__(
        self,
        config: Config,
        pythons: Mapping[str, str] | None = None,
        *,
        learner: bool = True,
        roles: Roles = Roles(),  # noqa: B008 - immutable
    ) -> None:
        """Start all actors; `pythons`: interpreters of rewards that have their own."""
        self.config = config
        r, t, retries = config.rollout, config.learner, config.ray.task_retries
        self.budget = Budget(config.ray.max_run_restarts)
        given: dict[str, Any] = {
            "retries": retries,
            "start_timeout": config.ray.start_timeout_s,
            "budget": self.budget,
        }
        shared = learner and t.colocated
        kind = roles.both if shared else roles.rollout
        # Reserved first, to find room on as few nodes as possible.
        self._together = pack_learners(config) if learner else None
        rollouts = [
            start_actor(kind, r, r.num_threads, config, [config], strategy="SPREAD")
            for _ in range(r.num_workers)
        ]
        self.rollouts = ActorPool("rollout", rollouts, **given)
        self.learner: ActorPool | None = None
        if learner:
            actors = [
                rollouts[0]
                if shared
                else start_actor(
                    roles.learner,
                    t,
                    t.num_threads,
                    config,
                    [config],
                    strategy=in_bundle(self._together, index),
                )
                for index in range(t.num_workers)
            ]
            self.learner = ActorPool("learner", actors, **given)
        self.rewards = {
            reward.key: reward_pool(
                reward, config, pythons or {}, self.budget, roles.reward, self.rollouts.all_busy
            )
            for reward in config.rewards
        }
        self.lost = 0  # tasks repeated because their data was lost with a node
        # Rollouts wait for slow rewards rather than filling the object store with images.
        self.backlog = Admission(config.rollout.unscored_units)
        self._meeting: str | None = None

    def pools(self) -> list[ActorPool]:
        learner = [self.learner] if self.learner else []
        rewards = [pool.actors for pool in self.rewards.values()]
        return [*rewards, *learner, self.rollouts]

    async def ready(self) -> None:
        """Wait for all actors at once; their imports take most of a run's startup time."""
        timeout = self.config.ray.start_timeout_s
        await gather(
            *(
                pool.ready(
                    timeout, self.config.rollout.min_workers if pool is self.rollouts else None
                )
                for pool in self.pools()
            )
        )

    def close(self) -> None:
        for pool in self.pools():
            pool.kill()
        if self._together is not None:
            remove_placement_group(self._together)

    def waiting(self) -> list[str]:
        """What every busy actor is doing, and for how long."""
        return [text for pool in self.pools() for text in pool.waiting()]

    def members(self) -> dict[str, list[Member]]:
        """All actors by role; a colocated one is listed under both of its roles."""
        return {pool.name: pool.members() for pool in self.pools()}

    def queues(self) -> dict[str, int]:
        """Tasks waiting for a free actor, by role; units waiting for admission, and admitted."""
        waiting = {pool.name: pool.queued for pool in self.pools()}
        return waiting | {"admission": self.backlog.waiting, "unscored": self.backlog.inside}

    def silence(self) -> float:
        """Seconds since any actor finished a task."""
        return time.monotonic() - max(pool.last_answer for pool in self.pools())

    @property
    def restarts(self) -> int:
        return sum(pool.restarts for pool in self.pools())

    # ---- work ----------------------------------------------------------------------------

    async def sample(
        self, unit: WorkUnit, policy: Refs
    ) -> tuple[SampleInfo, ray.ObjectRef, ray.ObjectRef]:
        """Sample a unit of work: facts about it, and refs of its trajectory and images."""
        info, (trajectory, images) = await self.rollouts.run(
            f"sampling iteration {unit.iteration}, unit {unit.index}",
            lambda actor: actor.sample.remote(unit, list(policy)),
            self.config.rollout.timeout_s,
        )
        return info, trajectory, images

    async def generate(
        self, prompts: Sequence[str], seeds: np.ndarray, policy: Refs, guidance_scale: float
    ) -> tuple[SampleInfo, ray.ObjectRef]:
        """Generate images only; without a policy, those of the base model."""
        info, (images,) = await self.rollouts.run(
            "generating evaluation images",
            lambda actor: actor.generate.remote(list(prompts), seeds, list(policy), guidance_scale),
            self.config.rollout.timeout_s,
        )
        return info, images

    def scoring_statistics(self) -> dict[str, float]:
        """Latency, queue and retries of each reward since the last call."""
        metrics: dict[str, float] = {}
        for pool in self.rewards.values():
            metrics |= pool.take_statistics()
        return metrics

    async def initialize(self, learned: Refs, begin: Refs = ()) -> tuple[Updated, Refs]:
        """Start or restore the learner: its report, and refs of the parts of `Learned`.

        `begin`: the snapshot of an adapter that a fresh learner starts from.
        """
        assert self.learner is not None

        async def prepare() -> SubmitRank:
            return lambda _, actor: actor.initialize.remote(list(learned), list(begin))

        timeout = self.config.ray.start_timeout_s
        return await self.learner.run_together("initialisation", prepare, timeout)

    async def update(self, task: UpdateTask) -> tuple[Updated, Refs]:
        """Train the next version: the learner's report, and refs of the parts of `Learned`."""
        assert self.learner is not None

        async def prepare() -> SubmitRank:
            size, address = self.config.learner.num_workers, await self._meet()
            return lambda rank, actor: actor.update.remote(task, Membership(rank, size, address))

        return await self.learner.run_together(
            f"the update of iteration {task.version}", prepare, self.config.learner.timeout_s
        )

    async def _meet(self) -> str | None:
        """The learners' meeting address: where all have met, or a new one if any has not."""
        if self.config.learner.num_workers == 1:
            return None
        assert self.learner is not None
        actors = self.learner.actors
        met = await gather(*(_soon(actor.meeting.remote()) for actor in actors))
        if self._meeting is None or set(met) != {self._meeting}:
            self._meeting = await _soon(actors[0].meeting_point.remote())
        return self._meeting

    async def export(self, policy: Refs) -> dict[str, bytes]:
        """An adapter's files by name."""
        files, _ = await self.rollouts.run(
            "adapter export", lambda actor: actor.export.remote(list(policy)), 300.0
        )
        return files

    async def load_policy(self, adapters: Sequence[tuple[float, Path]]) -> ray.ObjectRef:
        """A snapshot ref of exported adapters' weighted sum; only the driver needs the files."""
        given = [(weight, str(path), adapter_files(path)) for weight, path in adapters]
        _, (snapshot,) = await self.rollouts.run(
            f"loading {', '.join(path for _, path, _ in given)}",
            lambda actor: actor.load_policy.remote(given),
            300.0,
        )
        return snapshot

    async def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the encoder's limit."""
        count, _ = await self.rollouts.run(
            "prompt check", lambda actor: actor.count_truncated.remote(list(prompts)), 300.0
        )
        return count

    async def images(self, ref: ray.ObjectRef) -> np.ndarray:
        """Fetch images, uint8 [B, H, W, 3]; only for what the driver shows or stores."""
        payload: ImagePayload = (await self.fetch([ref]))[0]
        return unpack_images(payload)

    async def fetch(self, refs: Refs) -> list[Any]:
        """The values of a task's large results.

        Raises:
            LostObjectError: the node that held one of them is gone.
        """
        values = gather(*(asyncio.wrap_future(ref.future()) for ref in refs))
        try:
            return await asyncio.wait_for(values, self.config.ray.start_timeout_s)
        except TimeoutError:
            raise LostObjectError("driver: a result did not arrive") from None
        except RayError as error:
            raise readable("driver", "fetching a result", error) from None

    async def redo_if_lost(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Await `attempt`, and repeat it whenever its inputs or results are lost with a node.

        Raises:
            ActorError: that happened too often (ray.max_run_restarts).
        """
        while True:
            try:
                return await attempt()
            except LostObjectError as error:
                self.budget.spend(str(error))
                self.lost += 1
                log.warning("%s; recomputing it", error)


async def _soon(ref: ray.ObjectRef) -> Any:
    """The value of a call that returns at once."""
    return await asyncio.wait_for(asyncio.wrap_future(ref.future()), 60.0)
