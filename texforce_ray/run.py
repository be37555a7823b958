"""The command: `python -m texforce_ray.run --config configs/NAME.yaml [key.sub=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from texforce_ray.console import exit_code
from texforce_ray.errors import Interrupted
from texforce_ray.paths import check_local, local_path

if TYPE_CHECKING:
    from texforce_ray.config import Config
    from texforce_ray.driver.training import RunResult


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.run",
        description="Fine-tune the text encoder of Stable Diffusion by reinforcement learning.",
        epilog="Exit codes: 0 finished; 1 error; 2 invalid command line; 130 stopped by SIGINT or "
        "SIGTERM after writing a checkpoint.",
    )
    commands.add_argument("--config", type=local_path, help="YAML file, e.g. configs/shapes.yaml")
    commands.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="resume this run from its checkpoint; 'auto': resume the run in the config's run_dir "
        "if there is one, else start it (for jobs that are retried)",
    )
    commands.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, show the resolved config and the plan; start nothing",
    )
    commands.add_argument(
        "--fit",
        action="store_true",
        help="use the largest plan that fits the cluster: fewer rollout actors, learners and "
        "reward servers, but the same results",
    )
    commands.add_argument(
        "--profile",
        nargs="?",
        const="1",
        metavar="ITERATIONS",
        help="write profiles of these iterations, counted from 0, to RUN_DIR/profile, e.g. 1,2 "
        "(default 1, because iteration 0 is warm-up)",
    )
    commands.add_argument("--help-config", action="store_true", help="explain every key and exit")
    commands.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="e.g. iterations=40 rollout.num_workers=4",
    )
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    commands = parser()
    options = commands.parse_intermixed_args(arguments)
    if options.help_config:
        from texforce_ray.config.help import describe

        print(describe())
        return 0
    if options.config is None and options.resume is None:
        commands.error("give --config FILE, or --resume RUN_DIR")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if options.profile and "=" in options.profile:  # --profile alone, then an override
        options.overrides.insert(0, options.profile)
        options.profile = "1"
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    try:
        _start(options)
    except KeyboardInterrupt:
        raise Interrupted("stopped before the first iteration") from None


def _start(options: argparse.Namespace) -> None:
    plain = _profiled(options.profile)
    resume = _resumed(options.config, options.resume, options.overrides)
    config = _configure(options.config, resume, options.overrides, plain)
    if options.fit:
        config = _fit(config)
    if options.dry_run:
        _dry_run(config)
        return
    from texforce_ray.driver.training import train

    result = train(config, resume=resume is not None)
    _print_result(result)


def _profiled(text: str | None) -> dict[str, Any]:
    """The config value for `--profile 1,2`."""
    from texforce_ray.errors import ConfigError

    if not text:
        return {}
    try:
        return {"profile": [int(part) for part in text.split(",")]}
    except ValueError:
        raise ConfigError(
            f"--profile: {text!r} should be iterations, counted from 0, such as 1,2"
        ) from None


def _resumed(file: Path | None, resume: str | None, overrides: list[str]) -> Path | None:
    """The run to resume, or None to start one.

    Raises:
        ConfigError: 'auto' without a config file, or with a run_dir that is new every time.
    """
    from texforce_ray.config.io import load_config, resolve_run_dir
    from texforce_ray.errors import ConfigError

    if resume is None:
        return None
    if resume != "auto":
        check_local(resume, "--resume")
        return Path(resume)
    if file is None:
        raise ConfigError(
            "--resume auto: also give --config FILE, to start a run if there is none to resume"
        )
    config = load_config(file, overrides)
    if "{time}" in config.run_dir:
        raise ConfigError(
            f"run_dir: {config.run_dir!r} is a new folder every time; with --resume auto give a "
            "fixed one, e.g. run_dir=/data/runs/my-run"
        )
    path = Path(resolve_run_dir(config).run_dir)
    return path if (path / "config.yaml").is_file() else None


def _configure(
    file: Path | None, resume: Path | None, overrides: list[str], plain: dict[str, Any]
) -> Config:
    from texforce_ray.config.io import load_config
    from texforce_ray.records.run_directory import check_same, read_config

    if resume is None:
        return load_config(file, overrides, plain=plain)
    stored = read_config(resume)
    plain = plain | {"run_dir": str(resume.absolute())}
    config_file = resume / "config.yaml" if file is None else file
    now = load_config(config_file, overrides, plain=plain).sized_like(stored)
    check_same(stored, now, resume)
    return now


def _fit(config: Config) -> Config:
    from texforce_ray.cluster.plan import changes, fitted

    plan = fitted(config)
    print(changes(plan), file=sys.stderr)
    return plan.config


def _dry_run(config: Config) -> None:
    from texforce_ray.cluster.plan import explain
    from texforce_ray.config.io import resolve_run_dir, to_yaml
    from texforce_ray.driver.inputs import check_inputs

    config = resolve_run_dir(config)
    prompts = check_inputs(config)
    print(to_yaml(config))
    print("plan:")
    print(
        f"  {config.iterations} iterations x {config.prompts.per_iteration} prompts (of "
        f"{len(prompts.train)}) x {config.prompts.samples_per_prompt} samples = "
        f"{config.iterations * config.samples_per_iteration} samples"
    )
    print(
        f"  each iteration: {_units(config)}, {config.updates_per_iteration} updates of "
        f"{config.minibatch_size} samples{_pairs(config)}"
    )
    print(f"  evaluation on {len(prompts.evaluation)} prompts; staleness {config.max_staleness}")
    for line in [*explain(config), *_sensitivity(config)]:
        print(f"  {line}")
    print(f"  results go to {config.run_dir}")


def _sensitivity(config: Config) -> list[str]:
    """How steep the likelihood of each step is, if the objective has one.

    Raises:
        ConfigError: it would train on steps whose gradient is noise.
    """
    if config.objective.kind != "ppo":
        return []
    from texforce_ray.diffusion.sensitivity import check_trained, table
    from texforce_ray.model.schedule import planned_process
    from texforce_ray.rl.ppo_learner import candidate_steps

    process = planned_process(config)
    if process is None:
        return ["sensitivity of each step's likelihood: unknown before the model is loaded"]
    trained = candidate_steps(config, process).tolist()
    check_trained(process, trained)
    return table(process, trained)


def _units(config: Config) -> str:
    if not config.rollout.batch_size:
        return "units of as many samples as memory allows"
    return f"{config.units_per_iteration} units of {config.rollout.batch_size} samples"


def _pairs(config: Config) -> str:
    if config.objective.kind == "ppo":
        return f" x {config.trained_timesteps} timesteps"
    levels = config.noise_levels
    return "" if levels is None else f" x {levels} noise levels"


def _print_result(result: RunResult) -> None:
    """Print the results and where they are; the last line is one JSON object for scripts."""
    from texforce_ray.files import to_json

    total = result.comparison.get("total", {})
    print(f"\nresults in {result.run_dir}")
    for name, what in (
        ("adapter", "LoRA for diffusers and PEFT, with a model card"),
        ("evaluation/comparison.png", "base and tuned on the same prompts and seeds"),
        ("report.html", "curves, grids, settings"),
        ("metrics.jsonl", "one line per iteration"),
        ("profile", "Ray's timeline and torch's profiles, for https://ui.perfetto.dev"),
        ("samples", "every sample with its seed, rewards and advantage (parquet)"),
    ):
        if (result.run_dir / name).exists():
            print(f"  {name:<26} {what}")
    if total:
        print(f"reward {_change(total)}, {total['images']} images each, same prompts and seeds")
    if unseen := result.unseen.get("total"):
        print(f"unseen prompts {_change(unseen)}")
    for which in dict.fromkeys(point["prompts"] for point in result.guidance):
        row = [p for p in result.guidance if p["prompts"] == which]
        cells = [f"{p['guidance_scale']:g}: {p['base']:.3f} -> {p['tuned']:.3f}" for p in row]
        print(
            f"over guidance, {which} prompts: {', '.join(cells)} ({row[0]['images']} images each)"
        )
    keys = ("base", "tuned", "difference", "low", "high", "images")
    summary: dict[str, object] = {key: _rounded(total.get(key)) for key in keys}
    if unseen:
        summary["unseen"] = {key: _rounded(unseen.get(key)) for key in keys}
    if result.guidance:
        summary["guidance"] = result.guidance
    summary |= {"seconds": round(result.seconds, 1), "run_dir": str(result.run_dir)}
    print(to_json(summary))


def _change(of: Mapping[str, float]) -> str:
    return (
        f"{of['base']:.3f} -> {of['tuned']:.3f}: {of['difference']:+.3f}, 95 % interval "
        f"[{of['low']:+.3f}, {of['high']:+.3f}]"
    )


def _rounded(value: float | None) -> float | None:
    return round(value, 6) if isinstance(value, float) else value


if __name__ == "__main__":
    # Ray's usage statistics stay off unless asked for, and Ray prints nothing about them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.exit(main())
