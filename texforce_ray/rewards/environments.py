"""Build rewards' environments: `python -m texforce_ray.rewards.environments [REWARD ...]`."""

from __future__ import annotations

import argparse
import sys

from texforce_ray.console import exit_code
from texforce_ray.paths import local_path
from texforce_ray.rewards import find
from texforce_ray.rewards.isolation import SETS, Environment, build, default_root


def main(names: list[str] | None = None) -> int:
    """Build environments by name of a set or reward; by default, all isolated ones."""
    parser = argparse.ArgumentParser(
        prog="python -m texforce_ray.rewards.environments",
        description="Build the environments of rewards, for example in a cluster's image.",
    )
    parser.add_argument("names", nargs="*", help=f"rewards, or sets: {', '.join(SETS)}")
    parser.add_argument("--root", type=local_path, default=default_root(), help="their folder")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each")
    options = parser.parse_args(names)
    return exit_code(lambda: _build(options))


def _build(options: argparse.Namespace) -> None:
    isolated = ("mediapipe", "pyiqa", "open-clip", "image-reward")
    sets = [n if n in SETS else find(n).packages for n in options.names or isolated]
    for name in dict.fromkeys(sets):
        python = build(Environment.of_set(name), options.root, options.timeout, print)
        print(f"{name}: {python}")


if __name__ == "__main__":
    sys.exit(main())
