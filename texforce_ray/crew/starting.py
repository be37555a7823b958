"""Submits single actors with the resources of their role."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from texforce_ray.actors.process import ALLOCATOR
from texforce_ray.actors.reward import RewardServer
from texforce_ray.actors.roles import RETURNS, RewardScorer
from texforce_ray.cluster.environments import isolated_command
from texforce_ray.cluster.placement import actor_options
from texforce_ray.cluster.requests import needs
from texforce_ray.config import Config, RewardConfig
from texforce_ray.crew.budget import Budget
from texforce_ray.crew.pool import ActorPool
from texforce_ray.crew.scoring import RewardPool
from texforce_ray.rewards import arguments, resolve


def reward_pool(
    reward: RewardConfig,
    config: Config,
    pythons: Mapping[str, str],
    budget: Budget | None = None,
    server: type[RewardScorer] = RewardServer,
    sampling: Callable[[], bool] = lambda: False,
) -> RewardPool:
    """Start one reward's servers, in the interpreter that `pythons` has for it, if any.

    `sampling`: whether all rollout actors are at work.
    """
    given = [
        reward.key,
        resolve(reward.name, reward.target),
        arguments(reward.name, reward.kwargs),
        reward.batch_size,
        reward.timeout_s,
    ]
    python = pythons.get(reward.key)
    servers = [
        start_actor(server, reward, reward.num_threads, config, given, python)
        for _ in range(reward.replicas)
    ]
    actors = ActorPool(
        f"reward-{reward.key}",
        servers,
        retries=reward.retries,
        start_timeout=config.ray.start_timeout_s,
        budget=budget,
    )
    return RewardPool(reward, actors, sampling)


def start_actor(
    actor: type,
    role: Any,
    threads: int,
    config: Config,
    given: Sequence[Any],
    python: str | None = None,
    strategy: Any = "DEFAULT",
) -> Any:
    """An actor handle; `role` is the part of the config that sets what it may use."""
    # Ray would set the threads to num_cpus, and the rounding of sums would depend on placement.
    # The verbosity settings silence import-time warnings that users cannot act on.
    options = actor_options(needs(config, role))
    runtime: dict[str, Any] = options["runtime_env"]
    runtime["env_vars"] |= {
        "OMP_NUM_THREADS": str(threads),
        "TRANSFORMERS_VERBOSITY": "error",
        **ALLOCATOR,
        "GLOG_minloglevel": "2",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if python is not None:
        runtime["py_executable"] = isolated_command(python)
    # A slow reward is killed at each deadline: only the run's budget (ray.max_run_restarts) limits
    # its restarts, or a few timeouts would end the run instead of masking samples.
    restarts = -1 if isinstance(role, RewardConfig) else config.ray.max_restarts
    # Known to the handle, they cost nothing at each call.
    for method, count in RETURNS.items():
        if hasattr(actor, method):
            ray.method(num_returns=count)(getattr(actor, method))
    return (
        ray.remote(actor)
        .options(**options, max_restarts=restarts, scheduling_strategy=strategy)
        .remote(*given)
    )
