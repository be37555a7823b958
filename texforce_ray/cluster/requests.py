"""What a run needs from the cluster: the resources of its actors, role by role. No Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from texforce_ray.cluster.packing import short_of
from texforce_ray.config import Config, LearnerConfig, RewardConfig, RolloutConfig
from texforce_ray.errors import ConfigError

# What an actor takes of the custom resource that labels its nodes: any number of actors fits.
SLIVER = 0.001

Node = Mapping[str, float]  # a node's free Ray resources


@dataclass(frozen=True)
class Request:
    """`count` actors of one role, each with these Ray resources."""

    role: str
    count: int
    resources: dict[str, float]

    def __str__(self) -> str:
        return f"{self.count} x {self.role} ({format_resources(self.resources)} each)"


def format_resources(resources: Mapping[str, float]) -> str:
    """As readable text: "2 CPU, 1 GPU"."""
    return ", ".join(f"{a:g} {name}" for name, a in resources.items() if a) or "no resources"


def needs(config: Config, role: RolloutConfig | LearnerConfig | RewardConfig) -> dict[str, float]:
    """Ray resources of one actor; `role` is the part of the config that sets what it may use."""
    where = config.placement
    label = where.reward
    if not isinstance(role, RewardConfig):
        label = where.rollout if isinstance(role, RolloutConfig) else where.learner
    sliver = {label: SLIVER} if label is not None else {}
    return {"CPU": role.num_cpus, "GPU": role.num_gpus, **sliver, **role.resources}


def actor_requests(config: Config, *, learner: bool = True, whole: bool = False) -> list[Request]:
    """All actors that a run needs to start or, with `whole`, that it would like to have.

    Raises:
        ConfigError: the model's device is a GPU, but an actor requests none and would see none.
    """
    r, t = config.rollout, config.learner
    needy = {"rollout": r} | ({"learner": t} if learner and not t.colocated else {})
    for name, role in needy.items():
        if config.model.device.startswith("cuda") and not role.num_gpus:
            raise ConfigError(
                f"model.device: {config.model.device!r} needs a GPU for each actor, but "
                f"{name}.num_gpus is 0; set it to 1, or to a fraction"
            )
    rollouts = r.num_workers if whole else r.min_workers or r.num_workers
    asked = [Request("rollout", rollouts, needs(config, r))]
    if learner and not t.colocated:
        asked.append(Request("learner", t.num_workers, needs(config, t)))
    asked += [
        Request(f"reward {reward.key}", reward.replicas, needs(config, reward))
        for reward in config.rewards
    ]
    return asked


def totals(asked: Sequence[Request]) -> dict[str, float]:
    """The sum over all actors, by resource."""
    summed: dict[str, float] = {}
    for request in asked:
        for name, amount in request.resources.items():
            if amount:
                summed[name] = summed.get(name, 0.0) + amount * request.count
    return summed


def fits_a_node(request: Request, nodes: Sequence[Node]) -> bool:
    """Whether some node could hold one actor of the request."""
    return any(
        all(node.get(name, 0) + 1e-6 >= amount for name, amount in request.resources.items())
        for node in nodes
    )


def shortage(asked: Sequence[Request], nodes: Sequence[Node]) -> list[str]:
    """Why the actors do not fit: a line for each reason."""
    lines = [
        f"no single node is large enough for {request}"
        for request in asked
        if request.count and not fits_a_node(request, nodes)
    ]
    needed, free = totals(asked), totals([Request("", 1, dict(node)) for node in nodes])
    lines += [
        f"{name}: {needed[name]:g} needed, {free.get(name, 0):g} free"
        for name in short_of(needed, free)
    ]
    if lines:
        return lines
    return ["there is enough in total, but not in the pieces that single actors need"]
