"""Plans GPUs for rollout, reward and learner from the measured phase times of a short run.

Every phase is assumed to scale linearly with its actors: units of work are independent, and
learners share an update by samples. What does not scale is printed alongside: the driver, the
object store, the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from texforce_ray.config import Config
from texforce_ray.errors import TexForceError
from texforce_ray.records.metrics import read_metrics
from texforce_ray.records.run_directory import read_config

# CPU time of the driver, fitted by `make bench`: for each unit, and for the rest of an iteration.
DRIVER_S_PER_UNIT, DRIVER_S = 2.8e-3, 0.21


@dataclass(frozen=True)
class Costs:
    """Work of one sample, in seconds of one actor, and its bytes.

    rewards: by name, seconds of one server; on_gpu: the rewards whose servers hold a GPU.
    snapshot_bytes: of one policy version, which every rollout actor fetches.
    """

    rollout: float
    learner: float
    rewards: dict[str, float]
    on_gpu: frozenset[str]
    trajectory_bytes: float
    image_bytes: float
    snapshot_bytes: float


@dataclass(frozen=True)
class Allocation:
    """Actors of each role, the seconds of an iteration, and its load on everything else."""

    gpus: int
    rollouts: int
    learners: int
    rewards: dict[str, int]
    seconds: float
    waits_for: str
    driver_share: float
    object_store_bytes: float
    learner_bytes_per_second: float
    publish_bytes_per_second: float


def measured(run_dir: Path) -> tuple[Config, Costs]:
    """A run's costs: medians over all its iterations except the first.

    Raises:
        TexForceError: it is not a run, or has fewer than two iterations.
    """
    config, lines = read_config(run_dir), read_metrics(run_dir)[1:]
    if not lines:
        raise TexForceError(
            f"{run_dir} needs two or more iterations: the first is warm-up and is ignored"
        )
    count = config.samples_per_iteration

    def each(name: str) -> float:
        return median(line.get(name, 0.0) for line in lines) / count

    learners = config.learner.num_workers
    state = next((run_dir / "adapter").glob("adapter_model.safetensors"), None)
    return config, Costs(
        rollout=each("work/rollout"),
        learner=each("work/learner") * learners,
        rewards={r.key: each(f"work/reward_{r.key}") for r in config.rewards},
        on_gpu=frozenset(r.key for r in config.rewards if r.num_gpus),
        trajectory_bytes=each("object_store/trajectory_bytes"),
        image_bytes=each("object_store/image_bytes"),
        snapshot_bytes=float(state.stat().st_size) if state else 5e6,
    )


def plan(costs: Costs, gpus: int, samples: int, unit: int, staleness: int) -> Allocation:
    """The division of `gpus` with the shortest iteration of `samples`, in units of `unit`.

    With staleness 1, sampling and learning overlap and the slower one decides; with 0 they add up.
    Rewards on CPUs get as many servers as they need to keep up.
    """
    if gpus < 2:
        raise TexForceError(
            f"--gpus: {gpus} should be at least 2, for a rollout actor and a learner; one GPU can "
            "hold both with learner.colocated=true"
        )
    best: Allocation | None = None
    for learners in range(1, gpus):
        found = _divide(costs, gpus, learners, samples, unit, staleness)
        if found is not None and (best is None or found.seconds < best.seconds):
            best = found
    if best is None:
        raise TexForceError(
            f"--gpus: {gpus} are too few: a rollout actor, a learner and a server of each reward "
            f"on a GPU ({', '.join(sorted(costs.on_gpu))}) need {2 + len(costs.on_gpu)}"
        )
    return best


def _divide(
    costs: Costs, gpus: int, learners: int, samples: int, unit: int, staleness: int
) -> Allocation | None:
    left = gpus - learners
    # Rewards on GPUs share the remaining GPUs in proportion to their work, at least one each.
    on_gpu = {name: costs.rewards[name] for name in sorted(costs.on_gpu)}
    work = costs.rollout + sum(on_gpu.values())
    servers = {name: max(1, round(left * s / work)) for name, s in on_gpu.items()}
    rollouts = left - sum(servers.values())
    if rollouts < 1:
        return None
    # Whole units: the last wave of work is as long as a full one.
    waves = math.ceil(math.ceil(samples / unit) / rollouts)
    phases = {"rollout": waves * unit * costs.rollout}
    phases |= {f"reward {n}": samples * on_gpu[n] / count for n, count in servers.items()}
    sampling, learning = max(phases.values()), samples * costs.learner / learners
    slowest = max(phases, key=lambda name: phases[name])
    seconds = max(sampling, learning) if staleness else sampling + learning
    for name, cost in costs.rewards.items():
        servers.setdefault(name, max(1, math.ceil(samples * cost / seconds)))
    bytes_held = samples * costs.trajectory_bytes * (1 + staleness)
    return Allocation(
        gpus=gpus,
        rollouts=rollouts,
        learners=learners,
        rewards=servers,
        seconds=seconds,
        waits_for="learner" if learning > sampling else slowest,
        driver_share=(math.ceil(samples / unit) * DRIVER_S_PER_UNIT + DRIVER_S) / seconds,
        object_store_bytes=bytes_held + min(samples, 2 * rollouts * unit) * costs.image_bytes,
        learner_bytes_per_second=samples * costs.trajectory_bytes / learners / seconds,
        publish_bytes_per_second=rollouts * costs.snapshot_bytes / seconds,
    )


def table(allocations: Sequence[Allocation], samples: int) -> list[str]:
    """The allocations as a Markdown table."""
    lines = [
        "| GPUs | rollout | learner | reward servers | samples/s | waits for | driver busy "
        "| object store | into each learner | publishing |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for a in allocations:
        rewards = ", ".join(f"{name} {count}" for name, count in a.rewards.items())
        lines.append(
            f"| {a.gpus} | {a.rollouts} | {a.learners} | {rewards} | {samples / a.seconds:.1f} "
            f"| {a.waits_for} | {a.driver_share:.1%} | {a.object_store_bytes / 1e9:.2f} GB "
            f"| {a.learner_bytes_per_second / 1e6:.1f} MB/s "
            f"| {a.publish_bytes_per_second / 1e6:.1f} MB/s |"
        )
    return lines
