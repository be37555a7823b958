"""A run to be broken on purpose: with stand-in actors (numpy only) or with the embedded pipeline.

    python tests/chaos/job.py RUN_DIR [--k 0] [--resume] [--address A] [--break full:checkpoint:3]

`--break WHAT:WHERE:N`: at the N-th write of a checkpoint's file, of samples or of a metrics line
(WHERE: checkpoint, samples, metrics) the disk is full (WHAT: full) or the process dies (WHAT: die).
Traps (`traps.py`) are looked for in RUN_DIR.traps; `driver-clock` among them makes the wall clock
of the driver jump by up to a day, to and fro, at every look at it.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import ray  # noqa: E402
import traps  # noqa: E402

from tests.stand_in_run import EACH, SMALL  # noqa: E402
from texforce_ray.actors.roles import Roles  # noqa: E402
from texforce_ray.config.io import load_config, make_config  # noqa: E402
from texforce_ray.driver.training import train  # noqa: E402
from texforce_ray.errors import Interrupted, TexForceError  # noqa: E402
from texforce_ray.testing import stand_ins  # noqa: E402

# Trajectories and images of more than 100 kB: smaller ones Ray keeps with their owner, the driver,
# where no lost node could take them along.
SETTINGS = stand_ins.Settings(
    sample_seconds=0.15, update_seconds=0.2, latent_shape=(4, 32, 32), image_size=128
)
DAY_S = 86_400.0


def configured(run_dir: Path, staleness: int, iterations: int, *, soaking: bool = False) -> Any:
    """Stand-ins. Deadlines are short, so that a hung actor is detected within seconds."""
    places = {} if soaking else {"resources": {"learner": 1}}
    return make_config(
        SMALL
        | {
            "run_dir": str(run_dir),
            "iterations": iterations,
            "max_staleness": staleness,
            "rollout": EACH
            | {"num_workers": 2, "batch_size": 4, "timeout_s": 4, "resources": {"rollout": 1}},
            "rewards": [{"target": traps.REWARD, "timeout_s": 4, "retries": 4, "num_cpus": 0}],
            "optimizer": {"lr": 0.05},
            "learner": EACH | {"timeout_s": 5, **places},
            "eval": {"every": 0, "final_images": 0},
            "checkpoint": {"keep_last": 3},
            "ray": {"max_restarts": 40, "start_timeout_s": 120},
        }
    )


def embedded(run_dir: Path, staleness: int, iterations: int) -> Any:
    """The real actors on the embedded pipeline, placed likewise."""
    overrides = [
        f"run_dir={run_dir}",
        f"iterations={iterations}",
        f"max_staleness={staleness}",
        "rollout.num_workers=2",
        "rollout.num_cpus=0",
        "rollout.timeout_s=30",
        "rollout.resources={rollout: 1}",
        "learner.num_cpus=0",
        "learner.timeout_s=45",
        "learner.resources={learner: 1}",
        "rewards=[{name: shapes, num_cpus: 0, timeout_s: 20, retries: 4}]",
        "eval.every=0",
        "eval.final_images=0",
        "checkpoint.keep_last=3",
        "ray.max_restarts=40",
        "ray.start_timeout_s=240",
    ]
    return load_config(ROOT / "configs" / "smoke.yaml", overrides)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--k", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--address", default="local")
    parser.add_argument("--break", dest="broken")
    parser.add_argument("--trace", help="file in which stand-ins note what they do")
    parser.add_argument("--embedded", action="store_true", help="real actors")
    options = parser.parse_args()
    if options.broken:
        what, where, count = options.broken.split(":")
        _break(what, where, int(count))
    os.environ[traps.FOLDER] = str(options.run_dir.with_suffix(".traps"))
    threading.Thread(target=_watch_clock, daemon=True).start()
    local = options.address == "local"
    ray.init(
        address=options.address,
        runtime_env=_environment(),
        log_to_driver=False,
        **({"resources": {"rollout": 4, "learner": 1}} if local else {}),
    )
    given = options.run_dir, options.k, options.iterations
    config = embedded(*given) if options.embedded else configured(*given, soaking=local)
    try:
        train(
            config,
            resume=options.resume,
            roles=Roles() if options.embedded else _roles(options.trace),
        )
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except TexForceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _roles(trace: str | None) -> Roles:
    settings = {"settings": replace(SETTINGS, trace=trace)}
    return Roles(
        rollout=type("Rollout", (traps.TrappedRollout,), settings),
        learner=type("Learner", (traps.TrappedLearner,), settings),
    )


def _environment() -> dict[str, Any]:
    paths = [str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]  # for the traps
    path = os.pathsep.join(filter(None, paths))
    return {"env_vars": {"PYTHONPATH": path, traps.FOLDER: os.environ[traps.FOLDER]}}


def _watch_clock() -> None:
    while not traps.sprung("driver", "clock"):
        time.sleep(0.1)
    real, rng = time.time, random.Random(0)
    time.time = lambda: real() + rng.uniform(-DAY_S, DAY_S)  # type: ignore[assignment]


def _break(what: str, where: str, count: int) -> None:
    from texforce_ray.driver import recorder
    from texforce_ray.records import checkpoint, metrics

    if where == "checkpoint":
        checkpoint._write = _failing(what, count, checkpoint._write)  # type: ignore[assignment]
    elif where == "samples":
        recorder.write_samples = _failing(what, count, recorder.write_samples)
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
        from texforce_ray.files import write_error

        error = OSError(errno.ENOSPC, "No space left on device")
        # A checkpoint's writer explains the system's error itself.
        raise error if write.__name__ == "_write" else write_error(Path("disk"), error)

    return wrapped


if __name__ == "__main__":
    sys.exit(main())
