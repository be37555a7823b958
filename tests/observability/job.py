"""A run of stand-in actors (numpy only) on a Ray of its own, with an endpoint for Prometheus.

python tests/observability/job.py RUN_DIR PORT [key=value ...]
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
from texforce_ray.errors import Interrupted  # noqa: E402
from texforce_ray.testing import stand_ins  # noqa: E402

SETTINGS = stand_ins.Settings(
    sample_seconds=0.3, update_seconds=0.3, latent_shape=(4, 2, 2), image_size=16
)


def main() -> int:
    run_dir, port, *overrides = sys.argv[1:]
    base = SMALL | {
        "run_dir": run_dir,
        "iterations": 8,
        "max_staleness": 1,
        "rollout": EACH | {"num_workers": 2, "batch_size": 4, "max_unscored": 3},
        "rewards": [{"target": stand_ins.REWARD, "num_cpus": 0}],
        "learner": EACH,
        "eval": {"every": 4, "images": 4, "grid": 4},
    }
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=int(port),
        _system_config={"metrics_report_interval_ms": 500},
    )
    try:
        train(load_config(None, overrides, base), roles=stand_ins.roles(SETTINGS))
    except Interrupted:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
