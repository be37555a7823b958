"""What a run needs, whether the cluster has it, and the largest plan that fits: `run --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from texforce_ray.cluster.fit import Plan, fit, rollouts_that_fit
from texforce_ray.cluster.requests import (
    Node,
    Request,
    actor_requests,
    format_resources,
    shortage,
    totals,
)
from texforce_ray.config import Config
from texforce_ray.errors import ResourceError


@dataclass(frozen=True)
class Cluster:
    """What a run would find: the free resources of each node; `name` is for messages."""

    name: str
    nodes: Sequence[Node]
    whole: dict[str, float]
    scales: bool = False  # an autoscaler is running

    def has(self, names: Sequence[str]) -> str:
        """What there is of these resources: "4 GPU, 32 CPU (20 free) on 2 nodes"."""
        free = totals([Request("", 1, dict(node)) for node in self.nodes])
        parts = []
        for name in names:
            there, left = self.whole.get(name, 0), free.get(name, 0)
            used = f" ({left:g} free)" if left + 1e-6 < there else ""
            parts.append(f"{there:g} {name}{used}")
        nodes = "1 node" if len(self.nodes) == 1 else f"{len(self.nodes)} nodes"
        return f"{', '.join(parts) or 'none of the requested resources'} on {nodes}"


def look(config: Config) -> Cluster:
    """The cluster that the run would join or, without an address, start on this machine.

    Joins it only while looking; starts nothing.

    Raises:
        ResourceError: there is no cluster at the given address.
    """
    import ray

    from texforce_ray.cluster.autoscaling import at_work
    from texforce_ray.cluster.connection import address_of, connect
    from texforce_ray.cluster.placement import free_nodes, this_machine

    if not ray.is_initialized() and address_of(config)[0] is None:
        nodes = this_machine()
        return Cluster("this machine", nodes, dict(nodes[0]))
    mine = not ray.is_initialized()
    connect(config)
    try:
        name = f"the cluster at {ray.get_runtime_context().gcs_address}"
        return Cluster(name, free_nodes(), ray.cluster_resources(), at_work())
    finally:
        if mine:
            ray.shutdown()


def explain(config: Config) -> list[str]:
    """What the run needs and whether it fits, as readable lines."""
    asked = actor_requests(config, whole=True)
    lines = [*map(str, asked), f"in all: {format_resources(totals(asked))}"]
    try:
        return lines + _judged(config, look(config))
    except ResourceError as error:  # the plan itself is still valid
        return [*lines, f"could not check whether it fits: {error}"]


def fitted(config: Config) -> Plan:
    """The largest plan that fits the cluster.

    Raises:
        ResourceError: not even one actor of each role fits, or there is no cluster.
    """
    return fit(config, look(config).nodes)


def changes(plan: Plan) -> str:
    """What `--fit` changed, as a message."""
    if not plan.changes:
        return "--fit: everything fits, nothing was changed"
    changed = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in plan.changes.items())
    return f"--fit: {changed}; the results stay the same but take longer"


def _judged(config: Config, cluster: Cluster) -> list[str]:
    asked = actor_requests(config, whole=True)
    there = f"{cluster.name} has {cluster.has(list(totals(asked)))}"
    count = rollouts_that_fit(config, cluster.nodes)
    if count >= config.rollout.num_workers:
        return [f"fits: {there}"]
    if count >= (config.rollout.min_workers or config.rollout.num_workers):
        return [
            f"can start: {there}, room for {count} of {config.rollout.num_workers} rollout "
            "actors; the others join when the cluster grows"
        ]
    lines = [f"does not fit: this needs {format_resources(totals(asked))}; {there}"]
    lines += [f"  {reason}" for reason in shortage(asked, cluster.nodes)]
    if cluster.scales:
        lines.append("an autoscaler is running there: the run will request what is missing")
    try:
        lines.append(f"the largest plan that fits is {fit(config, cluster.nodes)}; --fit uses it")
    except ResourceError as error:
        lines.append(str(error).partition("\n")[0].rstrip(":"))
    return lines
