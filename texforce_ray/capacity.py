"""Plan GPUs for rollout, reward and learner: `python -m texforce_ray.capacity RUN_DIR`.

With --model instead of a run: the memory that each role needs on its GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from texforce_ray.console import exit_code
from texforce_ray.errors import ConfigError
from texforce_ray.paths import local_path

if TYPE_CHECKING:
    from texforce_ray.model.memory import Memory

_COUNTS = ("rank", "height", "width", "max_sequence_length")
_SIZES = {
    "batch_size": "images that a rollout actor samples at once",
    "decode_batch_size": "latents that the VAE decodes at once",
    "microbatch_size": "(sample, timestep) pairs in one pass of the learner",
    "prompts": "distinct prompts that are encoded together",
}
_DTYPES = ("float32", "float16", "bfloat16")


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.capacity",
        description="How many GPUs each role needs, from the measured times of a short run; or the "
        "memory that each role needs on its GPU, from a model's shapes.",
    )
    commands.add_argument(
        "run_dir", type=local_path, nargs="?", help="a short run on the same kind of GPU"
    )
    commands.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    run = commands.add_argument_group("GPUs, with RUN_DIR")
    run.add_argument(
        "--gpus", type=int, nargs="+", help="sizes to plan for (2 4 8 16 64 where enough)"
    )
    run.add_argument("--samples", type=int, help="samples per iteration (default: the run's)")
    run.add_argument("--staleness", type=int, choices=(0, 1), help="(default: the run's)")
    _add_memory(commands.add_argument_group("memory, instead of RUN_DIR"))
    return commands


def _add_memory(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--model",
        help="sd1.5, sdxl, sd3.5-medium, sd3.5-large, flux.1-dev, flux.1-schnell, z-image, or a "
        "local diffusers directory; only configs are read",
    )
    model.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of frozen weights")
    model.add_argument(
        "--train",
        default="",
        metavar="PARTS",
        help="text_encoder, text_encoder_2, text_encoder_3, denoiser, separated by commas "
        "(default: all CLIP encoders, or the first encoder)",
    )
    model.add_argument("--rank", type=int, help="of the adapters (default: the config's)")
    model.add_argument("--height", type=int, help="pixels (default: the model's)")
    model.add_argument("--width", type=int, help="pixels (default: the model's)")
    for name, what in _SIZES.items():
        model.add_argument(_option(name), type=int, default=8, help=f"{what} (8)")
    model.add_argument(
        "--guidance", type=float, help="(default: 5, or 1 if the model takes none); may take two "
        "passes through the denoiser at each step"
    )  # fmt: skip
    model.add_argument(
        "--max-sequence-length", type=int, help="tokens of the longest encoder (the family's)"
    )
    model.add_argument(
        "--park-encoders", action="store_true", help="frozen encoders wait in host memory"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if (options.run_dir is None) == (options.model is None):
        given = "neither was" if options.model is None else "both were"
        raise ConfigError(
            f"RUN_DIR, --model: {given} given; give a run's directory to plan GPUs, or --model to "
            "see the memory that each role needs"
        )
    if options.model is None:
        _plan(options)
    else:
        _measure(options)


def _plan(options: argparse.Namespace) -> None:
    from texforce_ray.cluster.capacity import measured, plan, table

    config, costs = measured(options.run_dir)
    samples = options.samples or config.samples_per_iteration
    staleness = config.max_staleness if options.staleness is None else options.staleness
    unit = config.rollout.batch_size
    least = 2 + len(costs.on_gpu)
    sizes = options.gpus or [gpus for gpus in (2, 4, 8, 16, 64) if gpus >= least]
    allocations = [plan(costs, gpus, samples, unit, staleness) for gpus in sizes]
    if options.json:
        print(json.dumps([a.__dict__ for a in allocations]))
    else:
        print("\n".join(table(allocations, samples)))


def _measure(options: argparse.Namespace) -> None:
    _check(options)
    from texforce_ray.model.memory import Workload, measure
    from texforce_ray.model.published import blueprint_of

    names = (*_COUNTS, *_SIZES, "dtype", "guidance", "park_encoders")
    train = [name.strip() for name in options.train.split(",") if name.strip()]
    load = Workload(train=train, **{name: getattr(options, name) for name in names})
    roles = measure(blueprint_of(options.model), load)
    if options.json:
        found = [role.__dict__ | {"total": role.total} for role in roles]
        print(json.dumps({"model": options.model, "bytes": found}))
        return
    print("\n".join(_memory_table(roles)))
    print(
        "\nA rollout actor's activations exist one after another: its total has the largest. A "
        "learner's adapter has\nits gradient and AdamW's two moments. Not included: reward actors, "
        "CUDA's context, fragments."
    )
    if options.park_encoders:
        print("`encoding` and `rest at the peak` include the visit of the largest parked encoder.")


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for a number that is not positive, or one side of an image."""
    for name in (*_COUNTS, *_SIZES):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{_option(name)}: {value} should be at least 1")
    if (options.height is None) != (options.width is None):
        raise ConfigError(
            f"--height, --width: {options.height or 'none'} and {options.width or 'none'}; give "
            "both, or neither for the model's own"
        )


def _memory_table(roles: Sequence[Memory]) -> list[str]:
    """GiB by kind and role, as a Markdown table."""
    columns = [
        {**role.weights, "adapter": role.adapter, **role.activations, "total": role.total}
        for role in roles
    ]
    kinds = dict.fromkeys(kind for column in columns for kind in column if kind != "total")
    lines = [
        f"| GiB | {' | '.join(role.role for role in roles)} |",
        f"| --- |{' ---: |' * len(roles)}",
    ]
    for kind in (*kinds, "total"):
        cells = [f"{column[kind] / 2**30:.2f}" if kind in column else "" for column in columns]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


if __name__ == "__main__":
    sys.exit(main())
