"""Pre-train the embedded latent-diffusion pipeline: `python -m texforce_ray.shapes.pretrain`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace

from texforce_ray.console import exit_code
from texforce_ray.paths import local_path
from texforce_ray.shapes.recipe import RECIPES, Recipe


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.shapes.pretrain",
        description="Train an embedded pipeline: VAE, denoiser and text encoders.",
    )
    commands.add_argument(
        "--out", type=local_path, required=True, help="directory for the finished pipeline"
    )
    commands.add_argument(
        "--work", type=local_path, help="state for resuming (default: OUT/../OUT.work)"
    )
    commands.add_argument(
        "--family",
        choices=list(RECIPES),
        default="ddim",
        help="'flow': a miniature of Stable Diffusion 3 that shares the VAE and the first text "
        "encoder of the embedded pipeline",
    )
    for name, value in asdict(Recipe()).items():
        if name != "family":
            commands.add_argument(
                f"--{name.replace('_', '-')}",
                type=type(value),
                help="(default: the family's recipe)",
            )
    commands.add_argument(
        "--compile", action="store_true", help="torch.compile the denoiser: needs a C++ compiler"
    )
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = vars(parser().parse_args(arguments))
    out, work, compiled = (options.pop(key) for key in ("out", "work", "compile"))

    def run() -> None:
        chosen = {name: value for name, value in options.items() if value is not None}
        recipe = replace(RECIPES[options["family"]], **chosen)
        where = work or out.with_name(out.name + ".work")
        if recipe.family == "flow":
            from texforce_ray.shapes.flow_pretraining import pretrain_flow as pretrain
        else:
            from texforce_ray.shapes.pretraining import pretrain
        pretrain(recipe, out, where, compiled=compiled)
        print(f"pipeline written to {out}")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
