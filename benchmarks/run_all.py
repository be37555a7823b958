"""All measurements that this machine can make, one after another: one JSON file, one Markdown page.

    python benchmarks/run_all.py [NAME ...]

Runs each script as a process of its own; writes benchmarks/results/bench.json and bench.md. A
script that fails is named there, and the others still run.
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
    "released": "Against the released schedule",
    "utilisation": "Utilisation",
    "scaling": "Scaling, with actors that sleep",
    "pipelining": "Pipelining, with actors that sleep",
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
    whole: dict[str, object] = {"machine": _machine(), "failed": failed}
    page = [f"{_machine()}", ""]
    for name, title in SCRIPTS.items():
        path = RESULTS / f"{name}.json"
        if path.exists() and name not in failed:
            whole[name] = json.loads(path.read_text())
            page += [f"## {title}", "", f"`python benchmarks/{name}.py`", ""]
            page += [(RESULTS / f"{name}.md").read_text()]
    if failed:
        page.append(f"failed: {', '.join(failed)}")
    (RESULTS / "bench.json").write_text(json.dumps(whole, indent=2) + "\n")
    (RESULTS / "bench.md").write_text("\n".join(page))
    print(f"{RESULTS / 'bench.md'} and bench.json")
    return 1 if failed else 0


def _machine() -> str:
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
