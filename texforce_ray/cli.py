"""The installed command: `texforce-ray run ...` is `python -m texforce_ray.run ...`, and so on.

Imports only the chosen command, so that `--help` responds at once.
"""

from __future__ import annotations

import importlib
import os
import sys

from texforce_ray import __version__

# Name: (module with main(arguments) -> exit code, what it does).
COMMANDS = {
    "run": ("texforce_ray.run", "train, resume, check a config (--dry-run)"),
    "evaluate": ("texforce_ray.evaluate", "compare adapters with their base"),
    "fuse": ("texforce_ray.fuse", "blend adapters without training"),
    "report": ("texforce_ray.report", "write an HTML page about one run or several"),
    "status": ("texforce_ray.status", "watch a run"),
    "judge": ("texforce_ray.judge", "let a vision-language model rank policies"),
    "capacity": ("texforce_ray.capacity", "plan how many GPUs each role needs"),
    "check-rewards": ("texforce_ray.rewards.check", "try rewards before a long run"),
    "serve-reward": ("texforce_ray.rewards.serve", "serve a reward over HTTP"),
    "help-config": ("texforce_ray.config_help", "explain every key of the configuration"),
}
_WRONG_USE = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else _WRONG_USE
    if given[0] == "--version":
        print(__version__)
        return 0
    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        print(f"texforce-ray: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return _WRONG_USE
    # Match `python -m`: Ray's usage statistics are off by default, and the user's own rewards can
    # be imported from the working directory.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.path.insert(0, os.getcwd())
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: texforce-ray COMMAND [arguments]; see COMMAND --help for details",
            "",
            *lines,
            "",
            f"version {__version__}; `texforce-ray run` is `python -m texforce_ray.run`, and so on",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
