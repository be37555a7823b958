"""Compare adapters with their base on the same prompts and seeds.

`python -m texforce_ray.evaluate --adapter runs/x/adapter --prompts shapes-unseen --out DIR`

Policies x prompt sets: any number of adapters and of weighted sums of adapters (`--fuse`), each on
every `--prompts`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from texforce_ray.errors import ConfigError, TexForceError
from texforce_ray.paths import check_local, local_path, named, weighted_sum

if TYPE_CHECKING:
    from texforce_ray.config import Config
    from texforce_ray.evaluation import Evaluation


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.evaluate",
        description="Score the base model and any adapters on the same prompts and seeds: means "
        "with bootstrap intervals, paired differences, a comparison grid.",
    )
    commands.add_argument(
        "--config", type=local_path, help="take model, sampling and rewards from here"
    )
    commands.add_argument(
        "--run", type=local_path, help="likewise, from a run directory, and its adapter"
    )
    commands.add_argument(
        "--trust",
        action="store_true",
        help="take code, packages, interpreters and services too from the config of --run",
    )
    commands.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="an exported adapter; may be given several times. A path that holds '=' is taken "
        "whole if it exists",
    )
    commands.add_argument(
        "--fuse",
        action="append",
        default=[],
        metavar="NAME=DIR[*W]+DIR[*W]",
        help="a weighted sum of adapters, exact; may be given several times. Paths that exist may "
        "hold '*' and '+'",
    )
    commands.add_argument(
        "--prompts",
        action="append",
        help="built-in set or prompt file (default: the config's); of several, each gets a folder",
    )
    commands.add_argument("--images", type=int, default=256, help="images of each policy (256)")
    commands.add_argument(
        "--save-images",
        type=int,
        default=0,
        metavar="N",
        help="keep each policy's first N images as files (for texforce_ray.judge)",
    )
    commands.add_argument("--out", type=local_path, required=True, help="directory for the results")
    commands.add_argument("overrides", nargs="*", metavar="key.sub=value", help="as for the run")
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    commands = parser()
    options = commands.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        configs, policies = _configure(options)
        summaries = asyncio.run(_evaluate(configs, policies, options))
    except TexForceError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    _print(summaries, options.out)
    return 0


Weighted = tuple[float, Path]


def _configure(
    options: argparse.Namespace,
) -> tuple[dict[str, Config], dict[str, list[Weighted]]]:
    """A config for each prompt set, and each policy's adapters with their weights."""
    from texforce_ray.model.location import adapter_files

    if options.images < 1:
        raise ConfigError(f"--images: {options.images} should be at least 1")
    policies: dict[str, list[Weighted]] = {}
    if options.run is not None:
        policies["tuned"] = [(1.0, options.run / "adapter")]
    for given in options.adapter:
        name, folder = named(given)
        label = name or (folder.parent.name if folder.name == "adapter" else folder.name)
        _add(policies, label, [(1.0, folder)], f"--adapter NAME={folder}")
    for given in options.fuse:
        name, equals, terms = given.partition("=")
        if not equals or not name:
            raise ConfigError(f"--fuse: {given!r} should look like NAME=DIR*0.5+DIR")
        _add(policies, name, weighted_sum(terms), f"--fuse NAME={terms}")
    for parts in policies.values():
        for _, folder in parts:
            adapter_files(folder)
    configs = {}
    for prompts in options.prompts or [None]:
        label, plain = _prompts(prompts)
        if label in configs:
            raise ConfigError(f"--prompts: two are named {label!r}; rename a file")
        configs[label] = _load(options, plain)
    return configs, policies


def _load(options: argparse.Namespace, plain: dict[str, Any]) -> Config:
    from texforce_ray.config_io import load_config
    from texforce_ray.trust import check_trusted

    overrides = options.overrides
    given = {override.partition("=")[0] for override in overrides}
    for name in ("guidance_scale", "eta"):
        if f"diffusion.{name}" in given and f"eval.{name}" not in given:
            # Nothing is trained here: what is asked for is how the images are drawn.
            overrides = [*overrides, f"eval.{name}=null"]
    if options.config is not None or options.run is None:
        return load_config(options.config, overrides, plain=plain)
    file = options.run / "config.yaml"
    config = load_config(file, overrides, plain=plain, stored=True)
    if not options.trust:
        check_trusted(config, overrides, str(file))
    return config


def _prompts(text: str | None) -> tuple[str, dict[str, Any]]:
    """A label, and the config's values for a built-in set or a file."""
    from texforce_ray.prompts.readers import stem
    from texforce_ray.prompts.sets import BUILT_IN

    if text is None:
        return "", {}
    check_local(text, "--prompts")
    named = text in BUILT_IN or not (Path(text).suffix or "/" in text or Path(text).is_file())
    values = {"set": text if named else None, "path": None if named else text, "dataset": None}
    label = text if named else stem(Path(text))
    return label, {f"eval.prompts.{key}": value for key, value in values.items()}


def _add(
    policies: dict[str, list[Weighted]], label: str, parts: list[Weighted], instead: str
) -> None:
    if label in policies or label == "base":
        raise ConfigError(f"the name {label!r} is taken; give it another one: {instead}")
    if "/" in label or label.startswith("."):  # images are saved in a folder of that name
        raise ConfigError(f"{label!r} cannot be a name; give another one: {instead}")
    policies[label] = parts


async def _evaluate(
    configs: dict[str, Config],
    policies: dict[str, list[Weighted]],
    options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Everything in one set of actors; a summary for each prompt set."""
    import ray

    from texforce_ray.actors.autoscaling import Autoscaler
    from texforce_ray.actors.connection import connect
    from texforce_ray.actors.crew import Crew
    from texforce_ray.actors.environments import prepare_environments
    from texforce_ray.actors.placement import wait_for_room
    from texforce_ray.collect import count_truncated
    from texforce_ray.driver import check_inputs
    from texforce_ray.evaluation import evaluate
    from texforce_ray.records.files import check_writable

    prompts = {label: check_inputs(config).evaluation for label, config in configs.items()}
    config = next(iter(configs.values()))  # they differ in the prompts alone
    check_writable(options.out)
    started = connect(config)
    autoscaler = Autoscaler(config, learner=False)
    summaries, crew = {}, None
    try:
        await wait_for_room(
            config,
            learner=False,
            autoscaler=autoscaler,
            say=lambda text: print(text, file=sys.stderr),
        )
        crew = Crew(config, await prepare_environments(config), learner=False)
        await crew.ready()
        autoscaler.give_back()
        refs = {name: [await crew.load_policy(parts)] for name, parts in policies.items()}
        for label, chosen in prompts.items():
            _, warning = await count_truncated(crew, chosen)
            if warning:
                print(warning, file=sys.stderr)
            results = {}
            for name, policy in {"base": [], **refs}.items():
                print(f"evaluating {name} {label and f'on {label} '}...", file=sys.stderr)
                keep = max(config.eval.grid, options.save_images)
                results[name] = await evaluate(crew, chosen, options.images, policy, keep)
            folder = options.out / label if len(configs) > 1 else options.out
            summaries[label] = _write(configs[label], results, folder)
            if options.save_images:
                _save_images(results, options.save_images, folder)
    finally:
        autoscaler.give_back()
        if crew is not None:
            crew.close()
        if started:
            ray.shutdown()
    return summaries


def _write(config: Config, results: dict[str, Evaluation], out: Path) -> dict[str, Any]:
    from texforce_ray.evaluation import compare
    from texforce_ray.records.intervals import bootstrap_interval
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
                    (result.means(names)[name], *bootstrap_interval(column, result.prompts)),
                    strict=True,
                )
            )
            for name, column in values.items()
        }
    differences = {
        label: compare(names, base, result) for label, result in results.items() if label != "base"
    }
    looks = {
        label: {
            "diversity": result.looks.diversity(base.prompts),
            "drift": result.looks.drift(base.looks),
            "style_drift": result.looks.style_drift(base.looks),
        }
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
    shown = min(config.eval.grid, len(base.shown))
    write_evaluation(
        out,
        summary,
        columns,
        [(label, result.shown[:shown]) for label, result in results.items()],
        base.prompts[:shown],
        [result.total[:shown].tolist() for result in results.values()],
    )
    return summary


def _save_images(results: dict[str, Evaluation], count: int, out: Path) -> None:
    """images/NAME/00000.png and prompts.json, in the order of samples.parquet."""
    from texforce_ray.records.files import atomic_write_text, to_json
    from texforce_ray.records.images import save_png

    for label, result in results.items():
        for index, image in enumerate(result.shown[:count]):
            save_png(out / "images" / label / f"{index:05d}.png", image)
    prompts = next(iter(results.values())).prompts[:count]
    atomic_write_text(out / "images" / "prompts.json", to_json(list(prompts)) + "\n")


def _print(summaries: dict[str, dict[str, Any]], out: Path) -> None:
    """A table, where the files are, and one JSON object in the last line."""
    from texforce_ray.records.files import to_json

    for prompts, summary in summaries.items():
        on = f" on {prompts}" if prompts else ""
        print(f"{summary['images']} images of each policy{on}, same prompts and seeds")
        for label in summary["means"]:
            _print_policy(label, summary)
    print(f"results in {out}: summary.json, samples.parquet, comparison.png")
    print(to_json(next(iter(summaries.values())) if len(summaries) == 1 else summaries))


def _print_policy(label: str, summary: dict[str, Any]) -> None:
    for name, value in summary["means"][label].items():
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
    print(
        f"  {label:<12} diversity {look['diversity']:.4f}, drift {look['drift']:.4f}, "
        f"style drift {look['style_drift']:.4f}"
    )


if __name__ == "__main__":
    sys.exit(main())
