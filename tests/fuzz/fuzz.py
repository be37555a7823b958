"""Feeds damaged files to everything that reads one.

    python tests/fuzz/fuzz.py --inputs 2000 [--seed 0] [--surface NAME]

Prints, for each surface: inputs, still read, rejected with an error of this package, and findings:
other exceptions, more than 10 s, files changed that were only to be read. Ends with 1 if there are
any, and keeps their inputs in runs/fuzz.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.fuzz.mutate import mutated  # noqa: E402
from tests.fuzz.surfaces import Files, Surface, surfaces  # noqa: E402

PATIENCE_S = 10


@dataclass
class Outcome:
    """The results of one surface's inputs."""

    inputs: int = 0
    read: int = 0
    rejected: int = 0
    findings: list[str] = field(default_factory=list)


def fuzz(surface: Surface, inputs: int, seed: int, keep: Path | None = None) -> Outcome:
    """Damage one file of a well-formed folder (now and then remove it), and read the folder."""
    rng = random.Random(f"{surface.name} {seed}")
    outcome = Outcome()
    everything = [data for files in surface.seeds for data in files.values()]
    previous = signal.signal(signal.SIGALRM, _too_long)
    try:
        for number in range(inputs):
            files = dict(rng.choice(surface.seeds))
            name = rng.choice(sorted(files))
            if len(files) > 1 and rng.random() < 0.02:
                del files[name]
            else:
                files[name] = mutated(files[name], everything, rng)
            files = surface.prepare(files)
            problem = _read(surface, files, outcome)
            if problem is not None:
                outcome.findings.append(f"input {number} ({name}): {problem}")
                if keep is not None:
                    _write(files, keep / surface.name.replace(" ", "-") / str(number))
    finally:
        signal.signal(signal.SIGALRM, previous)
    return outcome


def _read(surface: Surface, files: Files, outcome: Outcome) -> str | None:
    outcome.inputs += 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "given"
        _write(files, folder)
        try:
            signal.alarm(PATIENCE_S)
            surface.read(folder)
            outcome.read += 1
        except surface.accepts:
            outcome.rejected += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
        finally:
            signal.alarm(0)
        for file, data in files.items():
            if not file.startswith(surface.writes or ("\0",)) and _bytes(folder / file) != data:
                return f"{file} was changed by reading it"
    return None


def _write(files: Files, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"no answer within {PATIENCE_S} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=500, help="for each surface")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--surface", default="", help="only those whose names begin so")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    bad = False
    print("| surface | inputs | read | rejected | findings |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for surface in surfaces(Path(scratch)):
            if not surface.name.startswith(options.surface):
                continue
            found = fuzz(surface, options.inputs, options.seed, ROOT / "runs" / "fuzz")
            print(
                f"| {surface.name} | {found.inputs} | {found.read} | {found.rejected} "
                f"| {len(found.findings)} |",
                flush=True,
            )
            for line in dict.fromkeys(line.partition(": ")[2] for line in found.findings):
                print(f"  {line}", file=sys.stderr)
            bad |= bool(found.findings)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
