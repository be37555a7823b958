"""The largest plan of a run that fits given nodes. Pure functions over plain dicts; no Ray.

Only placement fields change, so a run that was made to fit gives the same bits as one that was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from texforce_ray.actors.packing import most, short_of
from texforce_ray.config import Config, LearnerConfig, RewardConfig, RolloutConfig
from texforce_ray.errors import ConfigError, ResourceError

# What an actor takes of the custom resource that names its nodes: any number of them fits.
SLIVER = 0.001

Node = Mapping[str, float]  # a node's Ray resources, those that are free


@dataclass(frozen=True)
class Request:
    """`count` actors of one role, each with these Ray resources."""

    role: str
    count: int
    resources: dict[str, float]

    def __str__(self) -> str:
        return f"{self.count} x {self.role} ({listed(self.resources)} each)"


def listed(resources: Mapping[str, float]) -> str:
    """For a person: "2 CPU, 1 GPU"."""
    return ", ".join(f"{a:g} {name}" for name, a in resources.items() if a) or "no resources"


def needs(config: Config, role: RolloutConfig | LearnerConfig | RewardConfig) -> dict[str, float]:
    """Ray resources of one actor; `role` is the part of the config that says what it may use."""
    where = config.placement
    label = where.reward
    if not isinstance(role, RewardConfig):
        label = where.rollout if isinstance(role, RolloutConfig) else where.learner
    sliver = {label: SLIVER} if label is not None else {}
    return {"CPU": role.num_cpus, "GPU": role.num_gpus, **sliver, **role.resources}


def requests(config: Config, *, learner: bool = True, whole: bool = False) -> list[Request]:
    """All actors that a run needs to start or, with `whole`, that it would like to have.

    Raises:
        ConfigError: the model's device is a GPU, and an actor asks for none: it would see none.
    """
    r, t = config.rollout, config.learner
    needy = {"rollout": r} | ({"learner": t} if learner and not t.colocated else {})
    for name, role in needy.items():
        if config.model.device.startswith("cuda") and not role.num_gpus:
            raise ConfigError(
                f"model.device: {config.model.device!r} needs a GPU for each actor: "
                f"{name}.num_gpus is 0; set it to 1, or to a part of one"
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


def rollouts_that_fit(config: Config, nodes: Sequence[Node], *, learner: bool = True) -> int:
    """How many of the rollout actors fit beside all others; -1: not even those do."""
    rollout, *others = requests(config, learner=learner, whole=True)
    return most([(o.resources, o.count) for o in others], rollout.resources, rollout.count, nodes)


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
    return ["there is enough in all, but not in the pieces that single actors need"]


@dataclass(frozen=True)
class Plan:
    """A config that fits, and what was changed to get there: {key: (before, after)}."""

    config: Config
    changes: dict[str, tuple[Any, Any]]

    def __str__(self) -> str:
        return " ".join(f"{key}={after}" for key, (_, after) in self.changes.items())


@dataclass(frozen=True)
class _Counts:
    rollouts: int
    learners: int
    replicas: tuple[int, ...]


def fit(config: Config, nodes: Sequence[Node]) -> Plan:
    """The largest plan that fits; the config itself if it does.

    Roles shrink together, since a run is as fast as the role that was cut most: the smallest share
    that any role keeps of what was asked for is made as large as possible. Then learners, reward
    servers and, last, rollout actors get what room is left: so rollout actors go first, and there
    are as many as fit beside the others.

    Args:
        config: what was asked for.
        nodes: the free resources of each node.

    Raises:
        ResourceError: not even one actor of each role fits; says what is short.
    """
    asked = _asked(config)

    def room(counts: _Counts) -> bool:
        return rollouts_that_fit(_with(config, counts), nodes) >= counts.rollouts

    if room(asked):
        return _plan(config, asked)
    smallest = _scaled(config, 0.0)
    if not room(smallest):
        least = _with(config, smallest)
        raise ResourceError(
            "\n".join(
                [
                    "not even the smallest plan fits (one rollout actor, one learner, one server "
                    "of each reward):",
                    *(f"  {line}" for line in shortage(requests(least), nodes)),
                    "it asks for " + "; ".join(map(str, requests(least))),
                    "ask for less of it (num_cpus, num_gpus, resources, placement of a role) or "
                    "add nodes",
                ]
            )
        )
    shares = sorted(_shares(asked))
    low, high = 0, len(shares)  # shares[:low] are known to fit, shares[high:] not to
    while low < high:
        middle = (low + high) // 2
        if room(_scaled(config, shares[middle])):
            low = middle + 1
        else:
            high = middle
    counts = _scaled(config, shares[low - 1]) if low else smallest
    learners = next(
        n
        for n in [*_possible_learners(config), counts.learners]
        if n == counts.learners or room(replace(counts, learners=n))
    )
    counts = replace(counts, learners=learners)
    for index, most_replicas in enumerate(asked.replicas):
        for n in range(most_replicas, counts.replicas[index], -1):
            more = (*counts.replicas[:index], n, *counts.replicas[index + 1 :])
            if room(replace(counts, replicas=more)):
                counts = replace(counts, replicas=more)
                break
    fitting = rollouts_that_fit(_with(config, replace(counts, rollouts=asked.rollouts)), nodes)
    return _plan(config, replace(counts, rollouts=fitting))


def _asked(config: Config) -> _Counts:
    return _Counts(
        config.rollout.num_workers,
        config.learner.num_workers,
        tuple(reward.replicas for reward in config.rewards),
    )


def _scaled(config: Config, share: float) -> _Counts:
    """The fewest actors of which every role keeps `share`, and at least one."""
    asked = _asked(config)

    def part(count: int) -> int:
        return next(n for n in range(1, count + 1) if n + 1e-9 >= share * count)

    learners = [n for n in _possible_learners(config) if n + 1e-9 >= share * asked.learners]
    return _Counts(part(asked.rollouts), learners[-1], tuple(part(n) for n in asked.replicas))


def _shares(asked: _Counts) -> set[float]:
    counts = {asked.rollouts, asked.learners, *asked.replicas}
    return {part / count for count in counts for part in range(1, count + 1)}


def _possible_learners(config: Config) -> list[int]:
    """Numbers of learners among which the gradient's fixed shards can be divided; most first."""
    t = config.learner
    return [n for n in range(t.num_workers, 0, -1) if t.gradient_shards % n == 0]


def _with(config: Config, counts: _Counts) -> Config:
    r, fewest = config.rollout, config.rollout.min_workers
    rollout = {
        "num_workers": counts.rollouts,
        "min_workers": None if fewest is None else min(fewest, counts.rollouts),
    }
    rewards = tuple(
        reward.model_copy(update={"replicas": n})
        for reward, n in zip(config.rewards, counts.replicas, strict=True)
    )
    return config.model_copy(
        update={
            "rollout": r.model_copy(update=rollout),
            "learner": config.learner.model_copy(update={"num_workers": counts.learners}),
            "rewards": rewards,
        }
    )


def _plan(config: Config, counts: _Counts) -> Plan:
    fitted = _with(config, counts)
    before, after = _counted(config), _counted(fitted)
    return Plan(
        fitted, {key: (before[key], after[key]) for key in after if before[key] != after[key]}
    )


def _counted(config: Config) -> dict[str, int | None]:
    return {
        "rollout.num_workers": config.rollout.num_workers,
        "rollout.min_workers": config.rollout.min_workers,
        "learner.num_workers": config.learner.num_workers,
        **{f"rewards.{i}.replicas": reward.replicas for i, reward in enumerate(config.rewards)},
    }
