"""Compare adapters with their base on the same prompts and seeds.

`python -m texforce_ray.evaluate --adapter runs/x/adapter --prompts shapes-unseen --out DIR`
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from texforce_ray.errors import ConfigError, TexForceError

if TYPE_CHECKING:
    from texforce_ray.config import Config
    from texforce_ray.evaluation import Evaluation


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.evaluate",
        description="Score the base model and any adapters on the same prompts and seeds: means "
        "with bootstrap intervals, paired differences, a comparison grid.",
    )
    commands.add_argument("--config", type=Path, help="take model, sampling and rewards from here")
    commands.add_argument(
        "--run", type=Path, help="likewise, from a run directory, and its adapter"
    )
    commands.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="an exported adapter; may be given several times",
    )
    commands.add_argument("--prompts", help="built-in set or prompt file (default: the config's)")
    commands.add_argument("--images", type=int, default=256, help="images of each policy (256)")
    commands.add_argument("--out", type=Path, required=True, help="directory for the results")
    commands.add_argument("overrides", nargs="*", metavar="key.sub=value", help="as for the run")
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    commands = parser()
    options = commands.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        config, adapters = _configure(options)
        summary = asyncio.run(_evaluate(config, adapters, options.images, options.out))
    except TexForceError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    _print(summary, options.out)
    return 0


def _configure(options: argparse.Namespace) -> tuple[Config, dict[str, Path]]:
    from texforce_ray.config_io import load_config
    from texforce_ray.model.location import adapter_files

    if options.images < 1:
        raise ConfigError(f"--images: {options.images} should be at least 1")
    adapters: dict[str, Path] = {}
    file = options.config
    if options.run is not None:
        file = file or options.run / "config.yaml"
        adapters["tuned"] = options.run / "adapter"
    for given in options.adapter:
        name, equals, path = given.rpartition("=")
        folder = Path(path)
        label = (
            name if equals else (folder.parent.name if folder.name == "adapter" else folder.name)
        )
        if label in adapters or label == "base":
            raise ConfigError(f"--adapter: {label!r} is taken; give it another name: NAME={path}")
        adapters[label] = folder
    for folder in adapters.values():
        adapter_files(folder)
    overrides = list(options.overrides)
    if options.prompts:
        kind = "path" if Path(options.prompts).suffix else "set"
        other = "set" if kind == "path" else "path"
        overrides += [f"eval.prompts.{kind}={options.prompts}", f"eval.prompts.{other}=null"]
    return load_config(file, overrides), adapters


async def _evaluate(
    config: Config, adapters: dict[str, Path], images: int, out: Path
) -> dict[str, Any]:
    import ray

    from texforce_ray.actors.crew import Crew, connect
    from texforce_ray.actors.environments import prepare_environments
    from texforce_ray.actors.placement import wait_for_room
    from texforce_ray.collect import count_truncated
    from texforce_ray.driver import check_inputs
    from texforce_ray.evaluation import evaluate
    from texforce_ray.records.files import check_writable

    _, prompts = check_inputs(config)
    check_writable(out)
    started = connect(config)
    await wait_for_room(config, learner=False)
    crew = Crew(config, await prepare_environments(config), learner=False)
    try:
        await crew.ready()
        _, warning = await count_truncated(crew, prompts)
        if warning:
            print(warning, file=sys.stderr)
        results = {"base": await evaluate(crew, prompts, images, [])}
        for name, folder in adapters.items():
            print(f"evaluating {name} ...", file=sys.stderr)
            policy = await crew.load_adapter(folder)
            results[name] = await evaluate(crew, prompts, images, [policy])
    finally:
        crew.close()
        if started:
            ray.shutdown()
    return _write(config, results, out)


def _write(config: Config, results: dict[str, Evaluation], out: Path) -> dict[str, Any]:
    from texforce_ray.evaluation import bootstrap_interval, compare
    from texforce_ray.records.run_directory import write_evaluation

    names = [reward.key for reward in config.rewards]
    base = results["base"]
    columns: dict[str, Any] = {"prompt": list(base.prompts), "seed": base.seeds}
    means: dict[str, Any] = {}
    for label, result in results.items():
        values = dict(zip(names, result.rewards.T, strict=True)) | {"total": result.total}
        columns |= {f"{label}_{name}": column for name, column in values.items()}
        means[label] = {
            name: dict(
                zip(
                    ("mean", "low", "high"),
                    (result.means(names)[name], *bootstrap_interval(column)),
                    strict=True,
                )
            )
            for name, column in values.items()
        }
    differences = {
        label: compare(names, base, result) for label, result in results.items() if label != "base"
    }
    looks = {
        label: {"diversity": result.diversity(), "drift": result.drift(base)}
        for label, result in results.items()
    }
    summary = {
        "images": len(base.prompts),
        "means": means,
        "against_base": differences,
        "looks": looks,
    }
    if len(differences) == 1:
        summary["rewards"] = next(iter(differences.values()))
    write_evaluation(
        out,
        summary,
        columns,
        [(label, result.shown) for label, result in results.items()],
        base.prompts[: len(base.shown)],
        [result.total[: len(base.shown)].tolist() for result in results.values()],
    )
    return summary


def _print(summary: dict[str, Any], out: Path) -> None:
    """A table, where the files are, and one JSON object in the last line."""
    from texforce_ray.records.files import to_json

    print(f"{summary['images']} images of each policy, same prompts and seeds")
    for label, rewards in summary["means"].items():
        for name, value in rewards.items():
            line = f"  {label:<12} {name:<24} {value['mean']:8.4f}"
            line += f"  [{value['low']:.4f}, {value['high']:.4f}]"
            if label != "base":
                paired = summary["against_base"][label][name]
                line += (
                    f"  {paired['difference']:+.4f} against base "
                    f"[{paired['low']:+.4f}, {paired['high']:+.4f}], better in "
                    f"{paired['win_rate']:.0%}"
                )
            print(line)
        look = summary["looks"][label]
        print(f"  {label:<12} diversity {look['diversity']:.4f}, drift {look['drift']:.4f}")
    print(f"results in {out}: summary.json, samples.parquet, comparison.png")
    print(to_json(summary))


if __name__ == "__main__":
    sys.exit(main())
