"""How many GPUs for rollout, reward and learner? From the measured phase times of a short run.

python -m texforce_ray.capacity RUN_DIR --gpus 8 64 1000 --samples 1024

Every phase is taken to scale linearly with its actors: units of work are independent, and learners
share an update by samples. What does not scale is printed beside: the driver, the object store, the
network.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from texforce_ray.config import Config
from texforce_ray.errors import TexForceError
from texforce_ray.paths import local_path
from texforce_ray.records.metrics import read_metrics
from texforce_ray.records.run_directory import read_config

DRIVER_S_PER_UNIT = 1e-3  # CPU time; `make bench` measures it


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
class Plan:
    """Actors of each role, the seconds of an iteration, and what the iteration asks of the rest."""

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
    """A run's costs: medians over its iterations but the first.

    Raises:
        TexForceError: not a run, or one of a single iteration.
    """
    config, lines = read_config(run_dir), read_metrics(run_dir)[1:]
    if not lines:
        raise TexForceError(f"{run_dir} has fewer than two iterations; the first is for caches")
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


def plan(costs: Costs, gpus: int, samples: int, unit: int, staleness: int) -> Plan:
    """The division of `gpus` with the shortest iteration of `samples`, in units of `unit`.

    With staleness 1, sampling and learning overlap and the slower one decides; with 0 they add up.
    Rewards on CPUs get as many servers as keep up.
    """
    if gpus < 2:
        raise TexForceError(
            "--gpus: at least 2, for a rollout actor and a learner; one GPU can "
            "hold both with learner.colocated=true"
        )
    best: Plan | None = None
    for learners in range(1, gpus):
        found = _divide(costs, gpus, learners, samples, unit, staleness)
        if found is not None and (best is None or found.seconds < best.seconds):
            best = found
    assert best is not None
    return best


def _divide(
    costs: Costs, gpus: int, learners: int, samples: int, unit: int, staleness: int
) -> Plan | None:
    left = gpus - learners
    # Rewards on GPUs take a share of what is left by their work, one at least.
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
    return Plan(
        gpus=gpus,
        rollouts=rollouts,
        learners=learners,
        rewards=servers,
        seconds=seconds,
        waits_for="learner" if learning > sampling else slowest,
        driver_share=math.ceil(samples / unit) * DRIVER_S_PER_UNIT / seconds,
        object_store_bytes=bytes_held + min(samples, 2 * rollouts * unit) * costs.image_bytes,
        learner_bytes_per_second=samples * costs.trajectory_bytes / learners / seconds,
        publish_bytes_per_second=rollouts * costs.snapshot_bytes / seconds,
    )


def table(plans: Sequence[Plan], samples: int) -> list[str]:
    """The plans as a Markdown table."""
    lines = [
        "| GPUs | rollout | learner | reward servers | samples/s | waits for | driver busy "
        "| object store | into each learner | publishing |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in plans:
        rewards = ", ".join(f"{name} {count}" for name, count in p.rewards.items())
        lines.append(
            f"| {p.gpus} | {p.rollouts} | {p.learners} | {rewards} | {samples / p.seconds:.1f} "
            f"| {p.waits_for} | {p.driver_share:.1%} | {p.object_store_bytes / 1e9:.2f} GB "
            f"| {p.learner_bytes_per_second / 1e6:.1f} MB/s "
            f"| {p.publish_bytes_per_second / 1e6:.1f} MB/s |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m texforce_ray.capacity", description=__doc__)
    parser.add_argument("run_dir", type=local_path, help="a short run on the same kind of GPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[2, 4, 8, 16, 64])
    parser.add_argument("--samples", type=int, help="of an iteration; default: the run's")
    parser.add_argument("--staleness", type=int, choices=(0, 1), help="default: the run's")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(arguments)
    try:
        config, costs = measured(options.run_dir)
        samples = options.samples or config.samples_per_iteration
        staleness = config.max_staleness if options.staleness is None else options.staleness
        unit = config.rollout.batch_size
        plans = [plan(costs, gpus, samples, unit, staleness) for gpus in options.gpus]
    except TexForceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([p.__dict__ for p in plans]))
    else:
        print("\n".join(table(plans, samples)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
