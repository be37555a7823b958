"""A run whose actors stand in for the real ones (numpy only), to be broken on purpose.

    python tests/chaos/job.py RUN_DIR [--k 0] [--resume] [--address A] [--break full:checkpoint:3]

`--break WHAT:WHERE:N`: at the N-th write of a checkpoint's file, of samples or of a metrics line
(WHERE: checkpoint, samples, metrics) the disk is full (WHAT: full) or the process dies (WHAT: die).
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import ray  # noqa: E402
import stand_ins  # noqa: E402

from texforce_ray.config_io import make_config  # noqa: E402
from texforce_ray.driver import train  # noqa: E402
from texforce_ray.errors import Interrupted, TexForceError  # noqa: E402

SETTINGS = stand_ins.Settings(
    sample_seconds=0.15, update_seconds=0.2, latent_shape=(4, 2, 2), image_size=16
)


def configured(run_dir: Path, staleness: int, iterations: int) -> Any:
    """Deadlines are short, so that who hangs is found within seconds."""
    each = {"num_cpus": 0, "num_threads": 1}
    return make_config(
        {
            "run_dir": str(run_dir),
            "iterations": iterations,
            "max_staleness": staleness,
            "diffusion": {"steps": 4},
            "prompts": {"per_iteration": 4, "samples_per_prompt": 4},
            "rollout": each
            | {
                "num_workers": 2,
                "batch_size": 4,
                "timeout_s": 4,
                "resources": {"rollout": 1},
            },
            "rewards": [{"target": stand_ins.REWARD, "timeout_s": 4, "retries": 4, "num_cpus": 0}],
            "advantage": {"mode": "batch"},
            "ppo": {"max_ratio_error": 1.0},
            "optimizer": {"lr": 0.05},
            "learner": each | {"timeout_s": 5},
            "eval": {"every": 0, "final_images": 0},
            "checkpoint": {"keep_last": 3},
            "ray": {"max_restarts": 20, "start_timeout_s": 120},
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--k", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--address", default="local")
    parser.add_argument("--break", dest="broken")
    options = parser.parse_args()
    if options.broken:
        what, where, count = options.broken.split(":")
        _break(what, where, int(count))
    ray.init(
        address=options.address,
        runtime_env=stand_ins.environment(),
        log_to_driver=False,
        **({"resources": {"rollout": 4}} if options.address == "local" else {}),
    )
    config = configured(options.run_dir, options.k, options.iterations)
    try:
        train(config, resume=options.resume, roles=stand_ins.roles(SETTINGS))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except TexForceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _break(what: str, where: str, count: int) -> None:
    from texforce_ray.records import checkpoint, metrics, run_directory

    if where == "checkpoint":
        checkpoint._write = _failing(what, count, checkpoint._write)  # type: ignore[assignment]
    elif where == "samples":
        run_directory.write_samples = _failing(what, count, run_directory.write_samples)
    else:
        log = metrics.MetricsLog
        log.append = _failing(what, count, log.append)  # type: ignore[method-assign]


def _failing(what: str, count: int, write: Callable[..., Any]) -> Callable[..., Any]:
    seen = 0

    def wrapped(*given: Any, **named: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen < count:
            return write(*given, **named)
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        from texforce_ray.records.files import write_error

        error = OSError(errno.ENOSPC, "No space left on device")
        # A checkpoint's writer explains the system's error itself.
        raise error if write.__name__ == "_write" else write_error(Path("disk"), error)

    return wrapped


if __name__ == "__main__":
    sys.exit(main())
