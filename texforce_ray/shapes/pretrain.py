"""Pre-train the embedded latent-diffusion pipeline: `python -m texforce_ray.shapes.pretrain`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from texforce_ray.console import exit_code
from texforce_ray.paths import local_path
from texforce_ray.shapes.recipe import Recipe


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.shapes.pretrain",
        description="Train VAE, U-Net and text encoder of the embedded pipeline from scratch.",
    )
    commands.add_argument(
        "--out", type=local_path, required=True, help="directory for the finished pipeline"
    )
    commands.add_argument(
        "--work", type=local_path, help="state for resuming (default: OUT/../OUT.work)"
    )
    for name, value in asdict(Recipe()).items():
        commands.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    commands.add_argument(
        "--compile", action="store_true", help="torch.compile the U-Net: needs a C++ compiler"
    )
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = vars(parser().parse_args(arguments))
    out, work, compiled = (options.pop(key) for key in ("out", "work", "compile"))

    def run() -> None:
        from texforce_ray.shapes.pretraining import pretrain

        where = work or out.with_name(out.name + ".work")
        pretrain(Recipe(**options), out, where, compiled=compiled)
        print(f"pipeline written to {out}")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
