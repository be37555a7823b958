"""Where does the time from the command to the end of the first iteration go?

    python benchmarks/startup.py [--config configs/shapes.yaml] [--repeat 3]

Runs one iteration of a config as a user would, notes when each line of its progress appears, and
then once more with Python's own clock of imports in every process of the run. Times until a line
are medians; imports are seconds of each role's process by package, while all share the cores.
Writes benchmarks/results/startup.json and startup.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from common import ROOT, write

# What a run prints, and what has happened by then.
MARKS = {
    "run directory": "command line, config, Ray",
    "base model": "actors: imports, models; the base model's evaluation",
    "iteration 1/1": "the first iteration",
}
PACKAGES = ("torch._dynamo", "sympy", "torch", "diffusers", "transformers", "peft", "ray", "numpy",
            "pyarrow", "pydantic", "texforce_ray")  # fmt: skip
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")


def run(
    config: str, folder: Path, environment: dict[str, str]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Seconds from the start of the command to each mark, and the run's actors."""
    command = [
        sys.executable, "-m", "texforce_ray.run", "--config", config, "iterations=1",
        "eval.final_images=0", f"run_dir={folder}",
    ]  # fmt: skip
    began, seen, actors = time.perf_counter(), {}, []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            for mark in MARKS:
                if line.startswith(mark):
                    seen.setdefault(mark, time.perf_counter() - began)
                    if (status := folder / "status.json").exists():  # while they are alive
                        actors = json.loads(status.read_text()).get("actors", actors)
    if process.returncode or seen.keys() != MARKS.keys():
        raise SystemExit("".join(output[-20:]))
    return seen, actors


def imports(config: str, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds by package, of each role's first process."""
    sessions = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray"
    _, actors = run(config, folder, {"PYTHONPROFILEIMPORTTIME": "1"})
    logs = sessions / "session_latest" / "logs"
    found: dict[str, dict[str, float]] = {}
    for actor in actors:
        pid = re.search(r"pid (\d+)", actor["process"])
        for path in logs.glob(f"worker-*-{pid[1]}.err") if pid else ():
            seconds: dict[str, float] = defaultdict(float)
            for took, name in _LINE.findall(path.read_text(errors="replace")):
                seconds[_package(name)] += int(took) / 1e6
            found.setdefault(actor["role"], dict(seconds))
    return found


def _package(name: str) -> str:
    return next((p for p in PACKAGES if name == p or name.startswith(f"{p}.")), "other")


def table(result: dict[str, Any]) -> list[str]:
    lines = ["| until | seconds | since the last |", "| --- | ---: | ---: |"]
    before = 0.0
    for mark, words in MARKS.items():
        at = result["seconds"][mark]
        lines.append(f"| {words} | {at:.1f} | {at - before:.1f} |")
        before = at
    roles = result["imports"]
    lines += ["", "| imports, s | " + " | ".join(roles) + " |", "| --- |" + " ---: |" * len(roles)]
    for package in (*PACKAGES, "other"):
        row = [seconds.get(package, 0.0) for seconds in roles.values()]
        if max(row, default=0.0) >= 0.05:
            lines.append(f"| {package} | " + " | ".join(f"{value:.1f}" for value in row) + " |")
    total = [sum(seconds.values()) for seconds in roles.values()]
    lines.append("| all | " + " | ".join(f"{value:.1f}" for value in total) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/shapes.yaml")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [run(options.config, folder / str(i), {})[0] for i in range(options.repeat)]
        result = {
            "config": options.config,
            "seconds": {mark: median(seen[mark] for seen in runs) for mark in MARKS},
            "imports": imports(options.config, folder / "imports"),
        }
    write("startup", result, table(result))


if __name__ == "__main__":
    main()
