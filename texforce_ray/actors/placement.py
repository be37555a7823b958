"""What a run asks of the cluster, and whether the cluster has it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from texforce_ray.config import Config
from texforce_ray.errors import ResourceError


@dataclass(frozen=True)
class Request:
    """`count` actors of one role, each with these Ray resources."""

    role: str
    count: int
    resources: dict[str, float]

    def __str__(self) -> str:
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items() if amount)
        return f"{self.count} x {self.role} ({each or 'no resources'} each)"


def requests(config: Config, *, learner: bool = True) -> list[Request]:
    """All actors that a run needs to start, by role."""
    r, t = config.rollout, config.learner
    needed = r.min_workers or r.num_workers
    asked = [Request("rollout", needed, {"CPU": r.num_cpus, "GPU": r.num_gpus, **r.resources})]
    if learner and not t.colocated:
        asked.append(
            Request("learner", t.num_workers, {"CPU": t.num_cpus, "GPU": t.num_gpus, **t.resources})
        )
    for reward in config.rewards:
        each = {"CPU": reward.num_cpus, "GPU": reward.num_gpus, **reward.resources}
        asked.append(Request(f"reward {reward.key}", reward.replicas, each))
    return asked


def totals(asked: list[Request]) -> dict[str, float]:
    """The sum over all actors, by resource."""
    summed: dict[str, float] = {}
    for request in asked:
        for name, amount in request.resources.items():
            if amount:
                summed[name] = summed.get(name, 0.0) + amount * request.count
    return summed


def fits_a_node(request: Request, nodes: Sequence[dict[str, float]]) -> bool:
    """Whether some node, empty, could hold one actor of the request."""
    return any(
        all(node.get(name, 0) + 1e-6 >= amount for name, amount in request.resources.items())
        for node in nodes
    )


async def wait_for_room(config: Config, *, learner: bool = True) -> None:
    """Return once the cluster has room for all actors.

    Raises:
        ResourceError: after `ray.resource_timeout_s` (a node may be about to join, another job
            about to end), saying what was asked for and what there is.
    """
    import ray

    asked = requests(config, learner=learner)
    needed = totals(asked)
    deadline = time.monotonic() + config.ray.resource_timeout_s
    while True:
        free = ray.available_resources()
        missing = [name for name, amount in needed.items() if free.get(name, 0) + 1e-6 < amount]
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        too_large = [request for request in asked if not fits_a_node(request, nodes)]
        if not missing and not too_large:
            return
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    whole = ray.cluster_resources()
    lines = [
        f"  {name}: asked {needed[name]:g}, free {free.get(name, 0):g}, "
        f"cluster has {whole.get(name, 0):g}"
        for name in missing
    ] + [f"  no single node is large enough for {request}" for request in too_large]
    raise ResourceError(
        "\n".join(
            [
                "the Ray cluster has no room for this run:",
                *lines,
                "the run asks for " + "; ".join(map(str, asked)),
                "ask for less (rollout.num_workers, rollout.num_cpus, learner.num_cpus, "
                "rewards.0.num_cpus, ... and likewise num_gpus) or add nodes",
            ]
        )
    )
