"""The largest plan of a run that fits given nodes. Pure functions over plain dicts; no Ray.

Only `free` fields change, so a fitted run gives the same bits as the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from texforce_ray.cluster.packing import most
from texforce_ray.cluster.requests import Node, actor_requests, shortage
from texforce_ray.config import Config
from texforce_ray.errors import ResourceError


def rollouts_that_fit(config: Config, nodes: Sequence[Node], *, learner: bool = True) -> int:
    """How many of the rollout actors fit beside all other actors; -1 if not even those fit."""
    rollout, *others = actor_requests(config, learner=learner, whole=True)
    return most([(o.resources, o.count) for o in others], rollout.resources, rollout.count, nodes)


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
    """The largest plan that fits; the config itself if it fits.

    Roles shrink together, since a run is only as fast as the role that was cut most: the smallest
    share of its requested actors that any role keeps is made as large as possible. Then learners,
    reward servers and, last, rollout actors get the remaining room: rollout actors are cut first,
    and there are as many as fit beside the others.

    Args:
        config: what was requested.
        nodes: the free resources of each node.

    Raises:
        ResourceError: not even one actor of each role fits; lists what is short.
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
                    *(f"  {line}" for line in shortage(actor_requests(least), nodes)),
                    "it needs " + "; ".join(map(str, actor_requests(least))),
                    "request less (num_cpus, num_gpus, resources, placement of a role) or add "
                    "nodes",
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
    """The fewest actors with which every role keeps `share` of its own, and at least one."""
    asked = _asked(config)

    def part(count: int) -> int:
        return next(n for n in range(1, count + 1) if n + 1e-9 >= share * count)

    learners = [n for n in _possible_learners(config) if n + 1e-9 >= share * asked.learners]
    return _Counts(part(asked.rollouts), learners[-1], tuple(part(n) for n in asked.replicas))


def _shares(asked: _Counts) -> set[float]:
    counts = {asked.rollouts, asked.learners, *asked.replicas}
    return {part / count for count in counts for part in range(1, count + 1)}


def _possible_learners(config: Config) -> list[int]:
    """Numbers of learners that evenly divide the gradient's fixed shards; largest first."""
    t = config.learner
    return [n for n in range(t.num_workers, 0, -1) if t.gradient_shards % n == 0]


def _with(config: Config, counts: _Counts) -> Config:
    fewest = config.rollout.min_workers
    return config.changed(
        {
            "rollout.num_workers": counts.rollouts,
            "rollout.min_workers": None if fewest is None else min(fewest, counts.rollouts),
            "learner.num_workers": counts.learners,
            **{f"rewards.{i}.replicas": count for i, count in enumerate(counts.replicas)},
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
