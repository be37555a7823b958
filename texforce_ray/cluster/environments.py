"""Builds the environments of a run's rewards on every node that may host their servers."""

from __future__ import annotations

import asyncio
import shlex
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from texforce_ray.cluster.answers import gather, readable
from texforce_ray.cluster.placement import actor_options
from texforce_ray.cluster.requests import Request, fits_a_node, needs
from texforce_ray.config import Config, RewardConfig
from texforce_ray.errors import ResourceError
from texforce_ray.rewards.isolation import Environment, choose, default_root


def reward_environment(reward: RewardConfig) -> Environment | str | None:
    """Where a reward runs; see `texforce_ray.rewards.isolation.choose`."""
    return choose(reward.name, reward.environment, reward.requirements, reward.key)


def isolated_command(python: str) -> str:
    """The part of Ray's command line with which a node's shell starts a reward's interpreter.

    The cluster's PYTHONPATH, PYTHONHOME and VIRTUAL_ENV are for the cluster's Python; of its
    PYTHONPATH only the entries that Ray added stay: this package and other uploaded modules.
    """
    ours = "$(tr : '\\n' <<<\"$PYTHONPATH\" | grep -F /runtime_resources/ | paste -sd : -)"
    return f'env -u PYTHONHOME -u VIRTUAL_ENV PYTHONPATH="{ours}" {shlex.quote(python)}'


async def prepare_environments(config: Config) -> dict[str, str]:
    """Build the rewards' environments; returns the interpreter of each reward that has its own.

    Builds on all nodes in parallel, once on each; the nodes print the progress.

    Returns:
        Interpreters by the rewards' keys.

    Raises:
        RewardError: an environment could not be built; quotes the installer.
        ResourceError: no node that is alive has room for a reward.
        ActorError: a node failed.
    """
    root = config.ray.environments or str(default_root())
    places = {reward.key: (reward, reward_environment(reward)) for reward in config.rewards}
    wanted: dict[Environment | str, list[str]] = {}
    for reward, place in places.values():
        if place is not None:
            nodes = wanted.setdefault(place, [])
            nodes += [node for node in _nodes_for(config, reward) if node not in nodes]
    for place, nodes in wanted.items():
        if not nodes:
            what = place if isinstance(place, str) else place.name
            raise ResourceError(f"no node that is alive can hold the rewards of environment {what}")
    jobs = {
        place: [_on_node(node, place, root, config.ray.environment_timeout_s) for node in nodes]
        for place, nodes in wanted.items()
    }
    answers = await gather(*(gather(*tasks) for tasks in jobs.values()))
    pythons = {place: found[0] for place, found in zip(jobs, answers, strict=True)}
    return {key: pythons[place] for key, (_, place) in places.items() if place is not None}


def _nodes_for(config: Config, reward: RewardConfig) -> list[str]:
    request = Request(f"reward {reward.key}", reward.replicas, needs(config, reward))
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node["NodeID"] for node in alive if fits_a_node(request, [node["Resources"]])]


async def _on_node(node: str, place: Environment | str, root: str, timeout: float) -> str:
    task = ray.remote(_make).options(
        **actor_options({}),
        max_retries=1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    what = place if isinstance(place, str) else place.name
    try:
        ref: Any = task.remote(place, root, timeout)
        return await asyncio.wait_for(asyncio.wrap_future(ref.future()), timeout + 60)
    except (RayError, TimeoutError) as error:
        if isinstance(error, TimeoutError):
            error = RayError(f"no answer within {timeout + 60:.0f} s")
        raise readable(f"node {node[:8]}", f"building environment {what}", error) from None


def _make(place: Environment | str, root: str, timeout: float) -> str:
    """Runs on the node."""
    import platform
    from pathlib import Path

    from texforce_ray.rewards.isolation import build, check_interpreter

    if isinstance(place, str):
        return check_interpreter(place)
    where = platform.node()
    return build(place, Path(root), timeout, lambda line: print(f"{where}: {line}", flush=True))
