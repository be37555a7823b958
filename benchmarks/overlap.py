"""How much of its time does the learner wait? Synchronous (k = 0) against overlapped (k = 1).

    python benchmarks/overlap.py [--iterations 8] [key.sub=value ...]

Both runs do the same work with two rollout actors and a learner of one thread each. Writes
benchmarks/results/overlap.json and overlap.md; figures are means over all iterations but the first
(compilation, caches) and, for k = 1, the last (nothing left to sample ahead).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

from texforce_ray import train
from texforce_ray.config.io import load_config
from texforce_ray.records.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORK = (
    "rollout.num_workers=2",
    "rollout.num_threads=1",
    "rollout.num_cpus=0.5",
    "learner.num_threads=1",
    "learner.num_cpus=0.5",
    "eval.every=0",
    "eval.final_images=0",
)


def measure(staleness: int, iterations: int, overrides: list[str], folder: Path) -> dict:
    config = load_config(
        ROOT / "configs" / "shapes.yaml",
        [
            *WORK,
            f"max_staleness={staleness}",
            f"iterations={iterations}",
            f"run_dir={folder / f'k{staleness}'}",
            *overrides,
        ],
    )
    train(config)
    lines = read_metrics(Path(config.run_dir))[1:-1]
    return {
        "max_staleness": staleness,
        "learner_wait_share": mean(m["share/learner_wait"] for m in lines),
        "samples_per_second": mean(m["samples_per_second"] for m in lines),
        "rollout_wait_seconds": mean(m["seconds/rollout_wait"] for m in lines),
        "update_seconds": mean(m["seconds/update"] for m in lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(k, options.iterations, options.overrides, Path(folder)) for k in (0, 1)]
    before, after = rows
    result = {
        "runs": rows,
        "learner_wait_k1_over_k0": after["learner_wait_share"] / before["learner_wait_share"],
        "samples_per_second_k1_over_k0": after["samples_per_second"] / before["samples_per_second"],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "overlap.json").write_text(json.dumps(result, indent=2) + "\n")
    table = [
        "| max_staleness | share of time the learner waits | samples/s |",
        "| --- | --- | --- |",
        *(
            f"| {r['max_staleness']} | {r['learner_wait_share']:.1%} "
            f"| {r['samples_per_second']:.1f} |"
            for r in rows
        ),
        "",
        f"k = 1 over k = 0: waiting x {result['learner_wait_k1_over_k0']:.2f}, "
        f"samples/s x {result['samples_per_second_k1_over_k0']:.2f}",
    ]
    (RESULTS / "overlap.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
