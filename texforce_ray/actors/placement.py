"""Whether the cluster has room for a run, and how each role's actors are laid over its nodes."""

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

from texforce_ray.actors.autoscaling import Autoscaler
from texforce_ray.actors.fit import Node, Request, listed, needs, requests, shortage, totals
from texforce_ray.actors.packing import most
from texforce_ray.config import Config
from texforce_ray.errors import ResourceError

_LOOK_S = 0.5  # between looks at the cluster
_SAY_S = 30.0  # between words about what is waited for

# Since 2.60 Ray shows every GPU to an actor that asked for none. The first variable makes it hide
# them, whatever their make; the others hold from the start, before Ray has read it.
_NO_GPU = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
}
# The first is read by every version of torch, and before the others.
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
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Return once the cluster has room for all actors that must be there to start.

    Raises:
        ResourceError: after `ray.resource_timeout_s` (a node may be about to join, another job
            about to end) or, with an autoscaler at work, `ray.autoscale_timeout_s`; says what was
            asked for and what there is.
    """
    asked = requests(config, learner=learner)
    began = said = time.monotonic()
    scaling = False
    while True:
        nodes = free_nodes()
        # Looked for again each time: a new cluster's autoscaler reports after a few seconds.
        if autoscaler is not None and not scaling and (scaling := autoscaler.ask()):
            say(f"asked the cluster's autoscaler for {autoscaler}")
        if has_room(asked, nodes):
            return
        now, setting = time.monotonic(), "autoscale" if scaling else "resource"
        if now - began > getattr(config.ray, f"{setting}_timeout_s"):
            break
        if now - said > _SAY_S:
            said = now
            say(f"waiting for room on the cluster: {'; '.join(shortage(asked, nodes))}")
        await asyncio.sleep(_LOOK_S)
    whole, needed = ray.cluster_resources(), totals(asked)
    has = {name: whole.get(name, 0) for name in needed}
    raise ResourceError(
        "\n".join(
            [
                "the Ray cluster has no room for this run:",
                *(f"  {line}" for line in shortage(asked, nodes)),
                "the run asks for " + "; ".join(map(str, asked)),
                f"the cluster has {described(has)} in all on {len(nodes)} nodes; waited "
                f"{now - began:.0f} s (ray.{setting}_timeout_s)",
                "--fit takes the largest plan that fits (with --dry-run it shows it); or ask for "
                "less (rollout.num_workers, rollout.num_cpus, learner.num_cpus, "
                "rewards.0.num_cpus, ... and likewise num_gpus), or add nodes",
            ]
        )
    )


def described(resources: Mapping[str, float]) -> str:
    """As `listed`, but with what there is none of."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or listed({})


def has_room(asked: Sequence[Request], nodes: Sequence[Node]) -> bool:
    """Whether all these actors can be laid over what is free on the nodes."""
    first, *others = asked
    pairs = [(request.resources, request.count) for request in others]
    return most(pairs, first.resources, first.count, nodes) >= first.count


def pack_learners(config: Config) -> PlacementGroup | None:
    """Bundles for the learners: all or none are reserved, on as few nodes as possible.

    They exchange gradients in every update. A bundle that is lost with its node is reserved
    elsewhere, where the learner then starts again. None: there is but one, or nothing to reserve.
    """
    t = config.learner
    bundle = {name: amount for name, amount in needs(config, t).items() if amount}
    if t.num_workers == 1 or t.colocated or not bundle:
        return None
    return placement_group([dict(bundle) for _ in range(t.num_workers)], strategy="PACK")


def options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Resources as Ray's options of an actor or a task; what asks for no GPU sees none."""
    custom = {name: x for name, x in resources.items() if name not in ("CPU", "GPU")}
    gpus = resources.get("GPU", 0)
    return {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": gpus,
        "resources": custom,
        "runtime_env": {"env_vars": _gpu_memory() if gpus else dict(_NO_GPU)},
    }


def _gpu_memory() -> dict[str, str]:
    """How torch takes the GPU's memory, unless the user has said so under any of its names.

    Shapes vary from batch to batch; without segments that grow, each leaves fragments of its own.
    """
    if any(os.environ.get(name) for name in _ALLOCATOR):
        return {}
    return {_ALLOCATOR[0]: "expandable_segments:True"}


def in_bundle(group: PlacementGroup | None, index: int) -> Any:
    """The scheduling strategy of the actor that bundle `index` is for."""
    if group is None:
        return "DEFAULT"
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
