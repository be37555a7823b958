"""All actors of a run: starts them, hands them work by role, ends them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group

from texforce_ray.actors.colocated import ColocatedActor
from texforce_ray.actors.environments import isolated_command
from texforce_ray.actors.fit import needs
from texforce_ray.actors.learner import LearnerActor, Membership
from texforce_ray.actors.messages import ImagePayload, Info, Scores, WorkUnit, unpack_images
from texforce_ray.actors.placement import in_bundle, options, pack_learners
from texforce_ray.actors.pool import ActorPool, Budget, Member, SubmitRank, gather, readable
from texforce_ray.actors.process import ALLOCATOR
from texforce_ray.actors.reward import RewardServer
from texforce_ray.actors.rollout import RolloutActor
from texforce_ray.actors.scoring import RewardPool
from texforce_ray.config import Config, RewardConfig
from texforce_ray.errors import LostObjectError
from texforce_ray.model.location import adapter_files
from texforce_ray.rewards import arguments, resolve

log = logging.getLogger(__name__)

_T = TypeVar("_T")
Refs = Sequence[ray.ObjectRef]


@dataclass(frozen=True)
class Roles:
    """The classes that do the work. Others with the same methods can stand in for them."""

    rollout: type = RolloutActor
    learner: type = LearnerActor
    both: type = ColocatedActor  # with learner.colocated


class Admission(asyncio.Semaphore):
    """A semaphore that knows how many wait before it and how many it has let in."""

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

    Await `wait_for_room` before: actors for which there is no room would wait without a word.
    """

    def __init__(
        self,
        config: Config,
        pythons: Mapping[str, str] | None = None,
        *,
        learner: bool = True,
        roles: Roles = Roles(),
    ) -> None:
        """Start all actors; `pythons`: interpreters of rewards that have one of their own."""
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
        # Before the others, so that it finds room on as few nodes as possible.
        self._together = pack_learners(config) if learner else None
        rollouts = [
            _start(kind, r, r.num_threads, config, [config], strategy="SPREAD")
            for _ in range(r.num_workers)
        ]
        self.rollouts = ActorPool("rollout", rollouts, **given)
        self.learner: ActorPool | None = None
        if learner:
            actors = [
                rollouts[0]
                if shared
                else _start(
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
            reward.key: reward_pool(reward, config, pythons or {}, self.budget)
            for reward in config.rewards
        }
        self.lost = 0  # tasks done again because a node took their data along
        # Rollouts wait for slow rewards rather than filling the object store with images.
        self.unscored = Admission(config.rollout.unscored_units)
        self._meeting: str | None = None

    def pools(self) -> list[ActorPool]:
        learner = [self.learner] if self.learner else []
        rewards = [pool.actors for pool in self.rewards.values()]
        return [*rewards, *learner, self.rollouts]

    async def ready(self) -> None:
        """Wait for all actors at once; their imports are most of a run's start."""
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
        """What every busy actor does, and for how long."""
        return [text for pool in self.pools() for text in pool.waiting()]

    def members(self) -> dict[str, list[Member]]:
        """All actors by role; a colocated one has two."""
        return {pool.name: pool.members() for pool in self.pools()}

    def queues(self) -> dict[str, int]:
        """Tasks that wait for a free actor, by role; units before and in sampling and scoring."""
        waiting = {pool.name: pool.queued for pool in self.pools()}
        return waiting | {"admission": self.unscored.waiting, "unscored": self.unscored.inside}

    def silence(self) -> float:
        """Seconds since any actor finished a task."""
        return time.monotonic() - max(pool.last_answer for pool in self.pools())

    @property
    def restarts(self) -> int:
        return sum(pool.restarts for pool in self.pools())

    # ---- work ----------------------------------------------------------------------------

    async def sample(
        self, unit: WorkUnit, policy: Refs
    ) -> tuple[Info, ray.ObjectRef, ray.ObjectRef]:
        """Trajectory and image refs of a unit of work."""
        info, (trajectory, images) = await self.rollouts.run(
            f"sampling iteration {unit.iteration}, unit {unit.index}",
            lambda actor: actor.sample.options(num_returns=3).remote(unit, list(policy)),
            self.config.rollout.timeout_s,
        )
        return info, trajectory, images

    async def generate(
        self, prompts: Sequence[str], seeds: np.ndarray, policy: Refs, guidance_scale: float
    ) -> tuple[Info, ray.ObjectRef]:
        """Images alone; those of the base model without a policy."""
        info, (images,) = await self.rollouts.run(
            "generating evaluation images",
            lambda actor: actor.generate.options(num_returns=2).remote(
                list(prompts), seeds, list(policy), guidance_scale
            ),
            self.config.rollout.timeout_s,
        )
        return info, images

    async def score(
        self,
        reward: RewardConfig,
        images: ray.ObjectRef,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
    ) -> Scores:
        """Scores of one unit's images; after all retries, the error instead of scores."""
        return await self.rewards[reward.key].score(images, prompts, metadata)

    def scoring_statistics(self) -> dict[str, float]:
        """Latency, queue and retries of each reward since the last call."""
        metrics: dict[str, float] = {}
        for pool in self.rewards.values():
            metrics |= pool.take_statistics()
        return metrics

    async def initialize(
        self, state: Refs, begin: Refs = ()
    ) -> tuple[dict[str, Any], tuple[ray.ObjectRef, ...]]:
        """Facts, and (state, snapshot, evaluation snapshot) of a fresh or restored learner.

        `begin`: the snapshot of an adapter that a fresh one starts from.
        """
        assert self.learner is not None

        async def prepare() -> SubmitRank:
            given = [list(state), list(begin)] if begin else [list(state)]
            return lambda _, actor: actor.initialize.options(num_returns=4).remote(*given)

        timeout = self.config.ray.start_timeout_s
        return await self.learner.run_together("initialisation", prepare, timeout)

    async def update(
        self,
        version: int,
        trajectories: Refs,
        advantages: np.ndarray,
        mask: np.ndarray,
        state: ray.ObjectRef,
        behaviour: Refs,
    ) -> tuple[dict[str, Any], tuple[ray.ObjectRef, ...]]:
        """Metrics, and (state, snapshot, evaluation snapshot) of the next version."""
        assert self.learner is not None

        async def prepare() -> SubmitRank:
            size, address = self.config.learner.num_workers, await self._meet()
            return lambda rank, actor: actor.update.options(num_returns=4).remote(
                version,
                list(trajectories),
                advantages,
                mask,
                [state],
                list(behaviour),
                Membership(rank, size, address),
            )

        return await self.learner.run_together(
            f"the update of iteration {version}", prepare, self.config.learner.timeout_s
        )

    async def _meet(self) -> str | None:
        """Where the learners work together: where they have met, or a new place if one has not."""
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
        """A snapshot ref of exported adapters' weighted sum; only the driver must see the files."""
        given = [(weight, str(path), adapter_files(path)) for weight, path in adapters]
        _, (snapshot,) = await self.rollouts.run(
            f"loading {', '.join(path for _, path, _ in given)}",
            lambda actor: actor.load_policy.options(num_returns=2).remote(given),
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
        """Await `attempt`, again whenever a node takes away what it made or was given.

        Raises:
            ActorError: too often (ray.max_run_restarts).
        """
        while True:
            try:
                return await attempt()
            except LostObjectError as error:
                self.budget.spend(str(error))
                self.lost += 1
                log.warning("%s; making it again", error)


async def _soon(ref: ray.ObjectRef) -> Any:
    """The value of a call that takes no time."""
    return await asyncio.wait_for(asyncio.wrap_future(ref.future()), 60.0)


def reward_pool(
    reward: RewardConfig,
    config: Config,
    pythons: Mapping[str, str],
    budget: Budget | None = None,
) -> RewardPool:
    """Start one reward's servers, each in the interpreter that `pythons` has for it."""
    given = [
        reward.key,
        resolve(reward.name, reward.target),
        arguments(reward.name, reward.kwargs),
        reward.batch_size,
        reward.timeout_s,
    ]
    python = pythons.get(reward.key)
    servers = [
        _start(RewardServer, reward, reward.num_threads, config, given, python)
        for _ in range(reward.replicas)
    ]
    actors = ActorPool(
        f"reward-{reward.key}",
        servers,
        retries=reward.retries,
        start_timeout=config.ray.start_timeout_s,
        budget=budget,
    )
    return RewardPool(reward, actors)


def _start(
    actor: type,
    role: Any,
    threads: int,
    config: Config,
    given: Sequence[Any],
    python: str | None = None,
    strategy: Any = "DEFAULT",
) -> Any:
    """An actor handle; `role` is the part of the config that says what it may use."""
    # Ray would set the threads to num_cpus, and the rounding of sums would depend on placement.
    # Libraries say while they are imported what a user of ours can do nothing about.
    chosen_options = options(needs(config, role))
    runtime: dict[str, Any] = chosen_options["runtime_env"]
    runtime["env_vars"] |= {
        "OMP_NUM_THREADS": str(threads),
        "TRANSFORMERS_VERBOSITY": "error",
        **ALLOCATOR,
        "GLOG_minloglevel": "2",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if python is not None:
        runtime["py_executable"] = isolated_command(python)
    # A slow reward is killed at each deadline: only the run's budget (ray.max_run_restarts) may
    # say that this was once too often, or a few timeouts would end the run instead of masking.
    restarts = -1 if isinstance(role, RewardConfig) else config.ray.max_restarts
    return (
        ray.remote(actor)
        .options(**chosen_options, max_restarts=restarts, scheduling_strategy=strategy)
        .remote(*given)
    )
