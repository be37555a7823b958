"""Plan GPUs for rollout, reward and learner: `python -m texforce_ray.capacity RUN_DIR`."""

from __future__ import annotations

import argparse
import json
import sys

from texforce_ray.console import exit_code
from texforce_ray.paths import local_path


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.capacity",
        description="How many GPUs each role needs, from the measured times of a short run.",
    )
    commands.add_argument("run_dir", type=local_path, help="a short run on the same kind of GPU")
    commands.add_argument(
        "--gpus", type=int, nargs="+", help="sizes to plan for (2 4 8 16 64 where enough)"
    )
    commands.add_argument("--samples", type=int, help="samples per iteration (default: the run's)")
    commands.add_argument("--staleness", type=int, choices=(0, 1), help="(default: the run's)")
    commands.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from texforce_ray.cluster.capacity import measured, plan, table

    config, costs = measured(options.run_dir)
    samples = options.samples or config.samples_per_iteration
    staleness = config.max_staleness if options.staleness is None else options.staleness
    unit = config.rollout.batch_size
    least = 2 + len(costs.on_gpu)
    sizes = options.gpus or [gpus for gpus in (2, 4, 8, 16, 64) if gpus >= least]
    allocations = [plan(costs, gpus, samples, unit, staleness) for gpus in sizes]
    if options.json:
        print(json.dumps([a.__dict__ for a in allocations]))
    else:
        print("\n".join(table(allocations, samples)))


if __name__ == "__main__":
    sys.exit(main())
