"""One step of an experiment: a command that anyone can run by hand, and whether it is done."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Terms = Sequence[tuple[str, float]]  # adapters by stage name, and their weights


@dataclass(frozen=True)
class Train:
    """A training run; its adapter is `name`/adapter.

    reward: the one that its curve shows, so that runs with different rewards can be compared.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    reward: str = "total"

    def command(self, folder: Path, seed: int) -> list[str]:
        run_dir = folder / self.name
        if (run_dir / "config.yaml").is_file():
            return [*_python("run"), "--resume", str(run_dir)]
        settings = [f"seed={seed}", f"run_dir={run_dir}", "eval.final_images=0", *self.overrides]
        return [*_python("run"), "--config", self.config, *settings]

    def done(self, folder: Path) -> bool:
        # A run writes its report last.
        return (folder / self.name / "report.html").is_file()


@dataclass(frozen=True)
class Evaluate:
    """Policies by label, each a weighted sum of trained adapters, on some prompt sets.

    note: shown in its tables' titles.
    """

    name: str
    config: str
    policies: Mapping[str, Terms]
    prompts: tuple[str, ...]
    images: int = 256
    overrides: tuple[str, ...] = field(default=())
    note: str = ""

    def command(self, folder: Path, seed: int) -> list[str]:
        del seed  # evaluations of all seeds use the same images
        given = [*_python("evaluate"), "--config", self.config, "--images", str(self.images)]
        for label, terms in self.policies.items():
            total = "+".join(f"{folder / name / 'adapter'}*{weight:g}" for name, weight in terms)
            given += ["--fuse", f"{label}={total}"]
        for prompts in self.prompts:
            given += ["--prompts", prompts]
        return [*given, "--out", str(folder / self.name), *self.overrides]

    def done(self, folder: Path) -> bool:
        return all((path / "comparison.png").is_file() for path in self.results(folder).values())

    def results(self, folder: Path) -> dict[str, Path]:
        """The folder of the result on each prompt set."""
        single = len(self.prompts) == 1
        return {p: folder / self.name / ("" if single else p) for p in self.prompts}


@dataclass(frozen=True)
class Sweep:
    """A grid of images over blends of two adapters (the paper's Fig. 12)."""

    name: str
    adapters: tuple[str, str]
    prompts: tuple[str, ...]
    points: int = 4

    def command(self, folder: Path, seed: int) -> list[str]:
        del seed
        given = [f"{folder / name / 'adapter'}" for name in self.adapters]
        return [
            *_python("fuse"), *given, "--out", str(folder / self.name),
            "--sweep", str(self.points), "--steps", "10", "--guidance", "5",
            "--prompts", *self.prompts,
        ]  # fmt: skip

    def done(self, folder: Path) -> bool:
        return (folder / self.name / "sweep.png").is_file()


Stage = Train | Evaluate | Sweep


def _python(command: str) -> list[str]:
    return [sys.executable, "-m", f"texforce_ray.{command}"]
