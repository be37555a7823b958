"""A run whose actors stand in for the real ones, on a cluster that a test has started.

    python tests/cluster/job.py RUN_DIR ADDRESS TRACE SECONDS [key.sub=value ...]

TRACE: file for what actors did; SECONDS: how long a unit of work takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402

from tests.stand_in_run import EACH, SMALL  # noqa: E402
from texforce_ray.config.io import load_config  # noqa: E402
from texforce_ray.driver.training import train  # noqa: E402
from texforce_ray.errors import TexForceError  # noqa: E402
from texforce_ray.testing import stand_ins  # noqa: E402

BASE = SMALL | {
    "rollout": {"num_cpus": 1, "num_threads": 1, "batch_size": 2},
    "learner": EACH,
    "rewards": [{"target": stand_ins.REWARD, "num_cpus": 0}],
    "optimizer": {"lr": 0.05},
    "eval": {"every": 0, "final_images": 0},
}


def main(run_dir: str, address: str, trace: str, seconds: str, *overrides: str) -> int:
    ray.init(address=address, log_to_driver=False)
    config = load_config(None, [f"run_dir={run_dir}", *overrides], base=BASE)
    settings = stand_ins.Settings(
        sample_seconds=float(seconds), latent_shape=(4, 2, 2), image_size=16, trace=trace
    )
    try:
        train(config, roles=stand_ins.roles(settings))
    except TexForceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
