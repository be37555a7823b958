"""A run as a function call, and the files that it writes.

    python examples/train_from_python.py configs/shapes.yaml iterations=8

`train` also works in a notebook: it runs its own event loop.
"""

from __future__ import annotations

import json
import sys

import pyarrow.parquet as pq

from texforce_ray import train
from texforce_ray.config.io import load_config
from texforce_ray.errors import TexForceError


def main(file: str = "configs/smoke.yaml", *overrides: str) -> None:
    """Train, then read the run's records as any script could."""
    try:
        config = load_config(file, overrides)  # a wrong key fails here
        result = train(config)
    except TexForceError as error:  # all that a user can act on; anything else is a bug
        sys.exit(f"error: {error}")

    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    for metrics in map(json.loads, lines):
        print(f"iteration {metrics['iteration']}: reward {metrics['reward/total_mean']:.3f}")

    newest = max((result.run_dir / "samples").glob("*.parquet"))
    best = max(pq.read_table(newest).to_pylist(), key=lambda row: row["total"])
    print(f"best sample: {best['prompt']!r}, seed {best['seed']}: {best['total']:.3f}")

    if "total" in result.comparison:  # eval.final_images > 0
        total = result.comparison["total"]
        print(f"base {total['base']:.3f}, tuned {total['tuned']:.3f}, same prompts and seeds")
    print(f"adapter: {result.adapter}")


if __name__ == "__main__":
    main(*sys.argv[1:])
