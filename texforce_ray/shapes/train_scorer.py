"""Train the differentiable scorer: `python -m texforce_ray.shapes.train_scorer`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from texforce_ray.console import exit_code
from texforce_ray.paths import local_path


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.shapes.train_scorer",
        description="Train the scorer of the shapes world on rendered scenes.",
    )
    commands.add_argument(
        "--out", type=local_path, default=Path(__file__).parent / "scorer.safetensors",
        help="safetensors file to write (default: the shipped one)",
    )  # fmt: skip
    commands.add_argument("--seed", type=int, default=0)
    commands.add_argument("--drawings", type=int, default=12_000)
    commands.add_argument("--steps", type=int, default=4500)
    commands.add_argument("--batch", type=int, default=128)
    commands.add_argument("--lr", type=float, default=2e-3)
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(arguments)

    def run() -> None:
        from texforce_ray.shapes.scorer_training import train_and_write

        error, correlation = train_and_write(**vars(options))
        print(f"{options.out}: error {error:.3f}, correlation {correlation:.3f} on other drawings")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
