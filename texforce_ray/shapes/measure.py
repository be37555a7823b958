"""Measure what the embedded pipeline draws: `python -m texforce_ray.shapes.measure`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from texforce_ray.console import exit_code
from texforce_ray.paths import local_path


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.shapes.measure",
        description="Rewards by kind of prompt, ability and guidance: a table and a picture.",
    )
    commands.add_argument("--model", default="embedded", help="a pipeline's directory")
    commands.add_argument(
        "--images", type=int, default=128, help="images per kind, ability and guidance"
    )
    commands.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    commands.add_argument("--steps", type=int, default=10)
    commands.add_argument(
        "--max-sequence-length", type=int, help="tokens of T5: 20 for the embedded flow pipeline"
    )
    commands.add_argument(
        "--out",
        type=local_path,
        default=Path("build/shapes"),
        help="folder for the picture and the numbers",
    )
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from texforce_ray.experiments.measuring import table, write

    cells = write(
        options.out,
        options.model,
        images=options.images,
        guidance=options.guidance,
        steps=options.steps,
        length=options.max_sequence_length,
    )
    print(table(cells))
    print(f"picture and numbers in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
