"""Look at one run or compare several: `python -m texforce_ray.report RUN [RUN ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from texforce_ray.console import exit_code
from texforce_ray.errors import TexForceError
from texforce_ray.paths import local_path


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.report",
        description="Write one self-contained HTML page about a run (even while it runs), or about "
        "several, with overlaid curves and images at matched reward.",
    )
    commands.add_argument("runs", nargs="+", type=local_path, metavar="RUN", help="run directories")
    commands.add_argument(
        "--out",
        type=local_path,
        help="file to write (default: RUN/report.html, or ./comparison.html)",
    )
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from texforce_ray.records.overlay import write_overlay
    from texforce_ray.records.report import write_report

    for run in options.runs:
        if not (run / "config.yaml").is_file():
            raise TexForceError(f"{run} is not a run: it has no config.yaml")
    if len(options.runs) == 1:
        print(write_report(options.runs[0], options.out))
    else:
        print(write_overlay(options.runs, options.out or Path("comparison.html")))


if __name__ == "__main__":
    sys.exit(main())
