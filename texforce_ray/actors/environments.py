"""Makes the environments of a run's rewards on every node that may hold their servers."""

from __future__ import annotations

import asyncio
import shlex
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from texforce_ray.actors.fit import Request, fits_a_node, needs
from texforce_ray.actors.placement import options
from texforce_ray.actors.pool import gather, readable
from texforce_ray.config import Config, RewardConfig
from texforce_ray.rewards.environments import Environment, choose, default_root


def chosen(reward: RewardConfig) -> Environment | str | None:
    """Where a reward runs; see `texforce_ray.rewards.environments.choose`."""
    return choose(reward.name, reward.environment, reward.requirements, reward.key)


def isolated_command(python: str) -> str:
    """How a node's shell starts an interpreter of its own: a piece of Ray's command line.

    The cluster's PYTHONPATH, PYTHONHOME and VIRTUAL_ENV are for the cluster's Python; of its
    PYTHONPATH only what Ray itself has put there stays: this package and other uploaded modules.
    """
    ours = "$(tr : '\\n' <<<\"$PYTHONPATH\" | grep -F /runtime_resources/ | paste -sd : -)"
    return f'env -u PYTHONHOME -u VIRTUAL_ENV PYTHONPATH="{ours}" {shlex.quote(python)}'


async def prepare_environments(config: Config) -> dict[str, str]:
    """The interpreter of each reward that has one of its own, by the reward's key.

    Builds on all nodes at once, once for each; progress is printed by the nodes.

    Raises:
        RewardError: an environment could not be made; the installer's own words.
        ActorError: a node failed.
    """
    root = config.ray.environments or str(default_root())
    places = {reward.key: (reward, chosen(reward)) for reward in config.rewards}
    wanted: dict[Environment | str, list[str]] = {}
    for reward, place in places.values():
        if place is not None:
            nodes = wanted.setdefault(place, [])
            nodes += [node for node in _nodes_for(config, reward) if node not in nodes]
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
        **options({}),
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
        raise readable(f"node {node[:8]}", f"making environment {what}", error) from None


def _make(place: Environment | str, root: str, timeout: float) -> str:
    """Runs on the node."""
    import platform
    from pathlib import Path

    from texforce_ray.rewards.environments import build, check_interpreter

    if isinstance(place, str):
        return check_interpreter(place)
    where = platform.node()
    return build(place, Path(root), timeout, lambda line: print(f"{where}: {line}", flush=True))
