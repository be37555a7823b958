"""Whether the cluster has room for a run, and how each role's actors are placed on its nodes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # no public call tells them apart
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from texforce_ray.cluster.autoscaling import Autoscaler
from texforce_ray.cluster.packing import most
from texforce_ray.cluster.requests import (
    Node,
    Request,
    actor_requests,
    format_resources,
    needs,
    shortage,
    totals,
)
from texforce_ray.config import Config
from texforce_ray.errors import ResourceError

_LOOK_S = 0.5  # between looks at the cluster
_REPORT_S = 30.0  # between messages about what the run is waiting for

# Since 2.60 Ray shows every GPU to an actor that requested none. The first variable makes Ray hide
# them, whatever their vendor; the others apply from the start, before Ray reads the first.
_NO_GPU = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
}
# Every version of torch reads the first one, and before the others.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def free_nodes() -> list[Node]:
    """What is free on each node of the cluster that this process has joined."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return [free for node, free in available_resources_per_node().items() if node in alive]


def this_machine() -> list[Node]:
    """The one node of a cluster that Ray would start here, as Ray counts it; starts nothing."""
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    spec = ResourceAndLabelSpec()
    spec.resolve(is_head=True)
    return [spec.to_resource_dict()]


async def wait_for_room(
    config: Config,
    *,
    learner: bool = True,
    autoscaler: Autoscaler | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Return once the cluster has room for all actors that a run needs to start.

    Raises:
        ResourceError: after `ray.resource_timeout_s` (a node may be about to join, another job
            about to end) or, with an autoscaler, `ray.autoscale_timeout_s`; lists what was
            requested and what there is.
    """
    asked = actor_requests(config, learner=learner)
    began = reported = time.monotonic()
    scaling = False
    while True:
        nodes = free_nodes()
        # Checked each time: a new cluster's autoscaler reports only after a few seconds.
        if autoscaler is not None and not scaling and (scaling := autoscaler.ask()):
            report(f"asked the cluster's autoscaler for {autoscaler}")
        if has_room(asked, nodes):
            return
        now, setting = time.monotonic(), "autoscale" if scaling else "resource"
        if now - began > getattr(config.ray, f"{setting}_timeout_s"):
            break
        if now - reported > _REPORT_S:
            reported = now
            report(f"waiting for room on the cluster: {'; '.join(shortage(asked, nodes))}")
        await asyncio.sleep(_LOOK_S)
    whole, needed = ray.cluster_resources(), totals(asked)
    has = {name: whole.get(name, 0) for name in needed}
    raise ResourceError(
        "\n".join(
            [
                "the Ray cluster has no room for this run:",
                *(f"  {line}" for line in shortage(asked, nodes)),
                "the run needs " + "; ".join(map(str, asked)),
                f"the cluster has {described(has)} in all on {len(nodes)} nodes; waited "
                f"{now - began:.0f} s (ray.{setting}_timeout_s)",
                "run with --fit to use the largest plan that fits (add --dry-run to see it), or "
                "request less (rollout.num_workers, rollout.num_cpus, learner.num_cpus, "
                "rewards.0.num_cpus, ... and likewise num_gpus), or add nodes",
            ]
        )
    )


def described(resources: Mapping[str, float]) -> str:
    """Like `format_resources`, but including amounts of 0."""
    return ", ".join(
        f"{amount:g} {name}" for name, amount in resources.items()
    ) or format_resources({})


def has_room(asked: Sequence[Request], nodes: Sequence[Node]) -> bool:
    """Whether all these actors fit into what is free on the nodes."""
    first, *others = asked
    pairs = [(request.resources, request.count) for request in others]
    return most(pairs, first.resources, first.count, nodes) >= first.count


def pack_learners(config: Config) -> PlacementGroup | None:
    """Bundles for the learners: all or none are reserved, on as few nodes as possible.

    They exchange gradients in every update. A bundle that is lost with its node is reserved
    elsewhere, and the learner restarts there. None: one learner only, or nothing to reserve.
    """
    t = config.learner
    bundle = {name: amount for name, amount in needs(config, t).items() if amount}
    if t.num_workers == 1 or t.colocated or not bundle:
        return None
    return placement_group([dict(bundle) for _ in range(t.num_workers)], strategy="PACK")


def actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Resources as Ray's options for an actor or a task; one that requests no GPU sees none."""
    custom = {name: x for name, x in resources.items() if name not in ("CPU", "GPU")}
    gpus = resources.get("GPU", 0)
    return {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": gpus,
        "resources": custom,
        "runtime_env": {"env_vars": _gpu_memory() if gpus else dict(_NO_GPU)},
    }


def _gpu_memory() -> dict[str, str]:
    """Torch's GPU allocator setting, unless the user has set it under any of its names.

    Shapes vary from batch to batch; without segments that grow, each shape fragments the memory.
    """
    if any(os.environ.get(name) for name in _ALLOCATOR):
        return {}
    return {_ALLOCATOR[0]: "expandable_segments:True"}


def in_bundle(group: PlacementGroup | None, index: int) -> Any:
    """The scheduling strategy of the actor for bundle `index`."""
    if group is None:
        return "DEFAULT"
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
