"""Compare adapters with their base on the same prompts and seeds.

`python -m texforce_ray.evaluate --adapter runs/x/adapter --prompts shapes-unseen --out DIR`

Policies x prompt sets: evaluates any number of adapters and weighted sums of adapters (`--fuse`),
each on every `--prompts`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from texforce_ray.console import exit_code
from texforce_ray.errors import ConfigError
from texforce_ray.paths import check_local, local_path, named, weighted_sum

if TYPE_CHECKING:
    from texforce_ray.config import Config
    from texforce_ray.driver.evaluation import Evaluation


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.evaluate",
        description="Score the base model and any adapters on the same prompts and seeds: means "
        "with bootstrap intervals, paired differences, a comparison grid.",
    )
    commands.add_argument(
        "--config", type=local_path, help="take model, sampling and rewards from this file"
    )
    commands.add_argument(
        "--run", type=local_path, help="take them, and the adapter, from this run directory"
    )
    commands.add_argument(
        "--trust",
        action="store_true",
        help="also accept code, packages, interpreters and services from the config of --run",
    )
    commands.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="an exported adapter; may be given several times. An existing path may contain '='",
    )
    commands.add_argument(
        "--fuse",
        action="append",
        default=[],
        metavar="NAME=DIR[*W]+DIR[*W]",
        help="an exact weighted sum of adapters; may be given several times. Existing paths may "
        "contain '*' and '+'",
    )
    commands.add_argument(
        "--prompts",
        action="append",
        help="built-in set or prompt file (default: the config's); may be given several times, "
        "each with its own folder",
    )
    commands.add_argument("--images", type=int, default=256, help="images per policy (256)")
    commands.add_argument(
        "--save-images",
        type=int,
        default=0,
        metavar="N",
        help="save each policy's first N images as files (for texforce_ray.judge)",
    )
    commands.add_argument("--out", type=local_path, required=True, help="directory for the results")
    commands.add_argument("overrides", nargs="*", metavar="key.sub=value", help="as for a run")
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    commands = parser()
    options = commands.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    configs, policies = _configure(options)
    _print(asyncio.run(_evaluate(configs, policies, options)), options.out)


Weighted = tuple[float, Path]


def _configure(
    options: argparse.Namespace,
) -> tuple[dict[str, Config], dict[str, list[Weighted]]]:
    """A config for each prompt set, and each policy's adapters with their weights."""
    from texforce_ray.artifacts.location import adapter_files

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
            raise ConfigError(f"--prompts: two sets are named {label!r}; rename a file")
        configs[label] = _load(options, plain)
    return configs, policies


def _load(options: argparse.Namespace, plain: dict[str, Any]) -> Config:
    from texforce_ray.config.io import load_config
    from texforce_ray.config.trust import check_trusted

    overrides = options.overrides
    given = {override.partition("=")[0] for override in overrides}
    for name in ("guidance_scale", "eta", "steps"):
        if f"diffusion.{name}" in given and f"eval.{name}" not in given:
            # Nothing is trained here, so the override is meant for drawing the images.
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
        raise ConfigError(f"the name {label!r} is taken; choose another one: {instead}")
    if "/" in label or label.startswith("."):  # images are saved in a folder of that name
        raise ConfigError(f"{label!r} is not a valid name; choose another one: {instead}")
    policies[label] = parts


async def _evaluate(
    configs: dict[str, Config],
    policies: dict[str, list[Weighted]],
    options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Evaluate everything with one set of actors; returns a summary for each prompt set."""
    from texforce_ray.cluster.connection import connected
    from texforce_ray.crew.opening import open_crew
    from texforce_ray.driver.collect import count_truncated
    from texforce_ray.driver.evaluation import evaluate
    from texforce_ray.driver.inputs import check_inputs
    from texforce_ray.files import check_writable

    def report(text: str) -> None:
        print(text, file=sys.stderr)

    prompts = {label: check_inputs(config).evaluation for label, config in configs.items()}
    config = next(iter(configs.values()))  # they differ only in their prompts
    check_writable(options.out)
    summaries = {}
    with connected(config):
        async with open_crew(config, learner=False, report=report) as crew:
            refs = {name: [await crew.load_policy(parts)] for name, parts in policies.items()}
            for label, chosen in prompts.items():
                _, warning = await count_truncated(crew, chosen)
                if warning:
                    report(warning)
                results = {}
                for name, policy in {"base": [], **refs}.items():
                    report(f"evaluating {name} {label and f'on {label} '}...")
                    keep = max(config.eval.grid, options.save_images)
                    results[name] = await evaluate(crew, chosen, options.images, policy, keep)
                folder = options.out / label if len(configs) > 1 else options.out
                summaries[label] = _write(configs[label], results, folder)
                if options.save_images:
                    _save_images(results, options.save_images, folder)
    return summaries


def _write(config: Config, results: dict[str, Evaluation], out: Path) -> dict[str, Any]:
    from texforce_ray.driver.evaluation import compare, write_results
    from texforce_ray.records.intervals import bootstrap_interval

    names = [reward.key for reward in config.rewards]
    base = results["base"]
    means: dict[str, Any] = {}
    for label, result in results.items():
        average = result.means(names)
        columns = dict(zip(names, result.rewards.T, strict=True)) | {"total": result.total}
        means[label] = {}
        for name, column in columns.items():
            low, high = bootstrap_interval(column, result.prompts)
            means[label][name] = {"mean": average[name], "low": low, "high": high}
    differences = {
        label: compare(names, base, result) for label, result in results.items() if label != "base"
    }
    looks = {
        label: {
            "diversity": result.looks.diversity(base.prompts),
            "drift": result.looks.drift(base.looks),
            "style_drift": result.looks.style_drift(base.looks),
            **result.looks.artefact_means(),
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
    write_results(out, summary, names, results, config.eval.grid)
    return summary


def _save_images(results: dict[str, Evaluation], count: int, out: Path) -> None:
    """Write images/NAME/00000.png and prompts.json, in the order of samples.parquet."""
    from texforce_ray.files import atomic_write_text, to_json
    from texforce_ray.records.images import save_png

    for label, result in results.items():
        for index, image in enumerate(result.shown[:count]):
            save_png(out / "images" / label / f"{index:05d}.png", image)
    prompts = next(iter(results.values())).prompts[:count]
    atomic_write_text(out / "images" / "prompts.json", to_json(list(prompts)) + "\n")


def _print(summaries: dict[str, dict[str, Any]], out: Path) -> None:
    """Print a table, where the files are, and one JSON object in the last line."""
    from texforce_ray.files import to_json

    for prompts, summary in summaries.items():
        on = f" on {prompts}" if prompts else ""
        print(f"{summary['images']} images per policy{on}, same prompts and seeds")
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
        f"style drift {look['style_drift']:.4f}, "
        f"high frequency {look['high_frequency']:.4f}, grid {look['grid']:.4f}"
    )


if __name__ == "__main__":
    sys.exit(main())
