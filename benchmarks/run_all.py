"""All measurements that this machine can make, one after another: one JSON file, one Markdown page.

    python benchmarks/run_all.py [NAME ...]

Runs each script as a process of its own; writes benchmarks/results/bench.json and bench.md. A
script that fails is named there, and the others still run. Both name the commit and the machine;
`compare.py` compares two of them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SCRIPTS = {
    "startup": "Until the first iteration",
    "released": "Against the released schedule",
    "utilisation": "Utilisation",
    "scaling": "Scaling, with actors that sleep",
    "pipelining": "Pipelining, with actors that sleep",
    "exchange": "Adding up gradients of many learners",
    "overlap": "Pipelining, on the embedded pipeline",
    "growth": "Cost growth",
    "numerics": "Do sampler and learner agree?",
    "rewards": "Batched rewards",
}


def main() -> int:
    chosen = sys.argv[1:] or list(SCRIPTS)
    if unknown := set(chosen) - SCRIPTS.keys():
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}")
        return 1
    failed = []
    for name in chosen:
        began = time.monotonic()
        print(f"== {name}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py")]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)
    # Results that are there from an earlier call keep the commit that they were measured at.
    last = RESULTS / "bench.json"
    commits = json.loads(last.read_text()).get("commits", {}) if last.exists() else {}
    commits |= dict.fromkeys(chosen, _commit())
    whole: dict[str, object] = {"machine": _machine(), "commit": _commit(), "failed": failed}
    whole["commits"] = commits
    page = [f"{_machine()}, commit {_commit()}", ""]
    for name, title in SCRIPTS.items():
        path = RESULTS / f"{name}.json"
        if path.exists() and name not in failed:
            whole[name] = json.loads(path.read_text())
            at = commits.get(name, "unknown")
            other = "" if at == _commit() else f", at commit {at}"
            page += [f"## {title}", "", f"`python benchmarks/{name}.py`{other}", ""]
            page += [(RESULTS / f"{name}.md").read_text()]
    if failed:
        page.append(f"failed: {', '.join(failed)}")
    (RESULTS / "bench.json").write_text(json.dumps(whole, indent=2) + "\n")
    (RESULTS / "bench.md").write_text("\n".join(page))
    print(f"{RESULTS / 'bench.md'} and bench.json")
    return 1 if failed else 0


def _machine() -> str:
    model = platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{os.cpu_count()} CPU cores, {model}, Python {platform.python_version()}"


def _commit() -> str:
    """The short hash, with '+' if files differ from it."""
    git = ["git", "-C", str(HERE)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changed.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
