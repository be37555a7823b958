"""Run the paper's experiments: `python -m texforce_ray.experiments shapes`.

Run again, it resumes where it stopped; the results page is written after every step.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from texforce_ray.console import exit_code
from texforce_ray.errors import ConfigError
from texforce_ray.experiments.shapes import EXPERIMENTS, EXTRA
from texforce_ray.experiments.stages import Stage
from texforce_ray.paths import local_path


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.experiments",
        description="Train, fuse and evaluate what the paper compares; write tables and figures.",
    )
    commands.add_argument("world", choices=["shapes"], help="shapes: the embedded pipeline")
    commands.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds (0)")
    commands.add_argument(
        "--only", nargs="+", choices=list(EXPERIMENTS), help="run only these experiments"
    )
    commands.add_argument(
        "--out", type=local_path, default=Path("runs/paper-shapes"), help="where the runs go"
    )
    commands.add_argument(
        "--results",
        type=Path,
        default=Path("docs/results/shapes"),
        help="where small results are kept; the page is written beside it",
    )
    commands.add_argument(
        "--page-only", action="store_true", help="write the page from the kept results; run nothing"
    )
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code of the first step that failed, or 0."""
    options = parser().parse_args(arguments)
    return exit_code(lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    from texforce_ray.experiments.page import write_page

    page = options.results.with_suffix(".md")
    if not options.page_only:
        if not Path("configs/shapes").is_dir():
            raise ConfigError("configs/shapes: not found; run this in the repository's root")
        chosen = options.only or [name for name in EXPERIMENTS if name not in EXTRA]
        plan = [(seed, stage) for seed in options.seeds for n in chosen for stage in EXPERIMENTS[n]]
        for index, (seed, stage) in enumerate(plan):
            code = _run(stage, seed, options, f"[{index + 1}/{len(plan)}]")
            if code:
                return code
            write_page(options.results, page)
    write_page(options.results, page)
    print(f"results: {page}")
    return 0


def _run(stage: Stage, seed: int, options: argparse.Namespace, where: str) -> int:
    from texforce_ray.experiments.results import keep, seeds_of

    folder, kept = options.out / f"seed-{seed}", options.results / f"seed-{seed}"
    if not stage.done(folder):
        command = stage.command(folder, seed)
        print(f"\n{where} seed {seed}, {stage.name}:\n  {shlex.join(command)}", flush=True)
        began = time.monotonic()
        # A separate process, as a user would start it: a failure there leaves the rest alone.
        code = subprocess.run(command, check=False).returncode
        if code:
            print(
                f"{where} {stage.name} exited with code {code}; run this again to resume",
                file=sys.stderr,
            )
            return code
        print(f"{where} {stage.name}: {time.monotonic() - began:.0f} s", flush=True)
    # One seed's pictures are enough for the page.
    keep(stage, folder, kept, pictures=seed == min([seed, *seeds_of(options.results)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
