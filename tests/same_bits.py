"""Do two checkouts compute the same? Whole smoke runs, compared bit for bit.

`python tests/same_bits.py OTHER_CHECKOUT`: for a change that should change nothing. Both are run by
this Python, each from its own source; the adapter's bytes, every column of every samples file and
all metrics must be equal, except those that depend on time (`TIMES`). This takes a minute for each
variant.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

HERE = Path(__file__).parents[1]
VARIANTS: dict[str, tuple[str, ...]] = {
    "k = 0": (),
    "k = 1, U-Net too": (
        "max_staleness=1", "iterations=3", "lora.denoiser.rank=2", "lora.denoiser.alpha=2",
    ),
}  # fmt: skip
# Keys that checkouts from before sections were renamed have instead.
OLD_KEYS = {"lora.denoiser.": "lora.unet."}
# Prefixes of metrics that depend on how long things took.
TIMES = ("seconds/", "share/", "work/", "mfu/", "samples_per_second", "scoring/")


def main() -> int:
    """Print what differs; returns 1 if anything does."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("other", type=Path, help="another checkout of this repository")
    other = options.parse_args().other.resolve()
    failed = False
    for name, overrides in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            runs = [_run(at, Path(folder) / side, overrides)
                    for side, at in (("other", other), ("this", HERE))]  # fmt: skip
            differences = list(_differences(*runs))
        print(f"{name}: {'DIFFERENT' if differences else 'equal'}", flush=True)
        print("".join(f"  {line}\n" for line in differences), end="")
        failed |= bool(differences)
    return int(failed)


def _run(checkout: Path, run_dir: Path, overrides: tuple[str, ...]) -> Path:
    if not (checkout / "texforce_ray/config").is_dir():
        for new, old in OLD_KEYS.items():
            overrides = tuple(text.replace(new, old) for text in overrides)
    command = [sys.executable, "-m", "texforce_ray.run", "--config", "configs/smoke.yaml"]
    done = subprocess.run(
        [*command, f"run_dir={run_dir}", *overrides],
        cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{checkout}: the run ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return run_dir


def _differences(one: Path, other: Path) -> Iterator[str]:
    pattern = "adapter/**/*.safetensors"
    files = sorted({f.relative_to(run) for run in (one, other) for f in run.glob(pattern)})
    assert files, "no adapters to compare"
    for name in files:
        here, there = (run / name for run in (one, other))
        if not (here.is_file() and there.is_file() and here.read_bytes() == there.read_bytes()):
            yield str(name)
    for file in sorted((one / "samples").iterdir()):
        tables = [pq.read_table(run / "samples" / file.name) for run in (one, other)]
        if not tables[0].equals(tables[1]):
            yield f"samples/{file.name}"
    lines = [_metrics(run) for run in (one, other)]
    if len(lines[0]) != len(lines[1]):
        yield f"metrics.jsonl: {len(lines[0])} and {len(lines[1])} lines"
    for here, there in zip(*lines, strict=False):
        for name in sorted({*here, *there}):
            if not name.startswith(TIMES) and here.get(name) != there.get(name):
                yield f"{name}: {here.get(name)} became {there.get(name)}"


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
