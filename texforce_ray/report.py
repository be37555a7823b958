"""Look at one run or compare several: `python -m texforce_ray.report RUN [RUN ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from texforce_ray.errors import TexForceError
from texforce_ray.paths import local_path


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.report",
        description="One self-contained HTML page: of a run (also while it runs), or of several, "
        "with their curves over each other and their images at matched reward.",
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
    from texforce_ray.records.overlay import write_overlay
    from texforce_ray.records.report import write_report

    options = parser().parse_args(arguments)
    try:
        for run in options.runs:
            if not (run / "config.yaml").is_file():
                raise TexForceError(f"{run} is not a run: it holds no config.yaml")
        if len(options.runs) == 1:
            page = write_report(options.runs[0], options.out)
        else:
            page = write_overlay(options.runs, options.out or Path("comparison.html"))
    except TexForceError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
