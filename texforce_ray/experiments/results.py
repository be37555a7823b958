"""The results of experiments that are kept: small files per seed, from which the page is made.

They are copied out of the runs, so that other seeds can be added on another day or machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from texforce_ray.errors import RunDirectoryError
from texforce_ray.experiments.stages import Evaluate, Stage, Train
from texforce_ray.files import atomic_write_bytes, atomic_write_text, to_json
from texforce_ray.records.intervals import crossed_interval
from texforce_ray.records.matched import Curve, curve_of
from texforce_ray.records.metrics import read_metrics
from texforce_ray.records.samples import read_samples


@dataclass(frozen=True)
class Row:
    """One policy over S seeds of training, on the same N images each.

    reward, base: means of the total. difference, low, high: paired, with a 95 % interval. by_seed:
    [S]. parts: of each reward, if there are several, the mean and the difference from the base's.
    """

    label: str
    base: float
    reward: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    win_rate: float
    diversity: float
    drift: float
    style_drift: float
    parts: dict[str, tuple[float, float]]

    @property
    def difference(self) -> float:
        return self.reward - self.base


def keep(stage: Stage, folder: Path, kept: Path, *, pictures: bool) -> None:
    """Copy a finished stage's small results from its run `folder` to `kept`."""
    if isinstance(stage, Train):
        curve = curve_of(stage.name, read_metrics(folder / stage.name), stage.reward)
        atomic_write_text(kept / stage.name / "curve.json", to_json(curve.points()) + "\n")
    elif isinstance(stage, Evaluate):
        for prompts, source in stage.results(folder).items():
            target = kept / stage.name / prompts
            target.mkdir(parents=True, exist_ok=True)
            for name in ("summary.json", "samples.parquet"):
                atomic_write_bytes(target / name, (source / name).read_bytes())
            if pictures:
                shutil.copyfile(source / "comparison.png", target / "comparison.png")
    elif pictures:
        (kept / stage.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / stage.name / "sweep.png", kept / stage.name / "sweep.png")


def seeds_of(results: Path) -> list[int]:
    """Seeds with kept results, ascending."""
    return sorted(int(path.name.removeprefix("seed-")) for path in results.glob("seed-*"))


def rows(results: Path, stage: Evaluate, prompts: str) -> list[Row]:
    """The policies of an evaluation over all seeds that have it; the base model's comes first."""
    folders = [results / f"seed-{seed}" / stage.name / prompts for seed in seeds_of(results)]
    folders = [folder for folder in folders if (folder / "samples.parquet").is_file()]
    if not folders:
        return []
    tables = [read_samples(folder / "samples.parquet") for folder in folders]
    shown = [(table.get("prompt"), table.get("seed")) for table in tables]
    for folder, drawn in zip(folders, shown, strict=True):
        if drawn != shown[0]:  # pairs and intervals would be meaningless
            raise RunDirectoryError(
                f"{folder} was evaluated on other prompts or seeds than {folders[0]}; evaluate "
                "both on the same ones, or move one away"
            )
    looks = [json.loads((folder / "summary.json").read_text())["looks"] for folder in folders]
    found = []
    for label in ("base", *stage.policies):
        if any(f"{label}_total" not in table for table in tables):
            continue
        base = np.stack([np.asarray(t["base_total"], dtype=np.float64) for t in tables])
        tuned = np.stack([np.asarray(t[f"{label}_total"], dtype=np.float64) for t in tables])
        low, high = crossed_interval(tuned - base, shown[0][0])
        wins = (tuned > base) + 0.5 * (tuned == base)
        found.append(
            Row(
                label, float(np.nanmean(base)), float(np.nanmean(tuned)), low, high,
                tuple(np.nanmean(tuned - base, axis=1).tolist()), float(wins.mean()),
                float(np.mean([look[label]["diversity"] for look in looks])),
                float(np.mean([look[label]["drift"] for look in looks])),
                float(np.mean([look[label]["style_drift"] for look in looks])),
                _parts(tables, label),
            )
        )  # fmt: skip
    return found


def _parts(tables: Sequence[dict[str, list[Any]]], label: str) -> dict[str, tuple[float, float]]:
    names = [key.removeprefix("base_") for key in tables[0] if key.startswith("base_")]
    names = [name for name in names if name != "total"]
    if len(names) < 2:
        return {}
    mean = {
        (model, name): float(np.nanmean([np.asarray(t[f"{model}_{name}"], float) for t in tables]))
        for model in ("base", label)
        for name in names
    }
    return {name: (mean[label, name], mean[label, name] - mean["base", name]) for name in names}


def curves(results: Path, names: Sequence[str]) -> list[Curve]:
    """Evaluation curves of runs by name, the mean over seeds."""
    found = []
    for name in names:
        files = sorted(results.glob(f"seed-*/{name}/curve.json"))
        if files:
            found.append(Curve.mean(name, [json.loads(file.read_text()) for file in files]))
    return found
