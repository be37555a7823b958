"""The run directory: everything that a run leaves behind. Only the driver writes it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from texforce_ray.config import Config
from texforce_ray.config_io import load_config, to_yaml
from texforce_ray.errors import ConfigError, RunDirectoryError
from texforce_ray.records.files import atomic_write_bytes, atomic_write_text, check_writable
from texforce_ray.records.images import comparison, grid, save_png
from texforce_ray.records.metrics import MetricsLog
from texforce_ray.records.model_card import ModelCardInfo, model_card
from texforce_ray.records.report import write_report
from texforce_ray.records.samples import read_samples, samples_path, to_parquet, write_samples

log = logging.getLogger(__name__)


class RunDirectory:
    """Writes a run's files; `start` iterations are already done."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self.metrics = MetricsLog(path, resume_from=start)

    @staticmethod
    def create(config: Config) -> RunDirectory:
        """Start a new run's directory.

        Raises:
            RunDirectoryError: not writable, or there is a run already.
        """
        path = Path(config.run_dir)
        if any((path / name).exists() for name in ("metrics.jsonl", "samples", "checkpoints")):
            raise RunDirectoryError(
                f"{path} already holds a run; continue it with --resume {path}, or choose another "
                "run_dir"
            )
        check_writable(path)
        atomic_write_text(path / "config.yaml", to_yaml(config))
        return RunDirectory(path, start=0)

    @staticmethod
    def reopen(config: Config, start: int) -> RunDirectory:
        """Continue a run's directory after `start` iterations."""
        path = Path(config.run_dir)
        check_writable(path)
        atomic_write_text(path / "config.yaml", to_yaml(config))
        return RunDirectory(path, start)

    def recorded_mask(self, iteration: int, seeds: np.ndarray) -> np.ndarray:
        """bool [N], False for samples that an earlier attempt at this iteration masked for good."""
        path = samples_path(self.path, iteration)
        if not path.exists():
            return np.ones(len(seeds), dtype=bool)
        try:
            columns = read_samples(path)
        except (RunDirectoryError, KeyError) as error:
            log.warning("%s is damaged and will be written again: %s", path, error)
            return np.ones(len(seeds), dtype=bool)
        if not np.array_equal(columns["seed"], seeds):
            return np.ones(len(seeds), dtype=bool)
        return ~np.array(columns["masked"], dtype=bool)

    def write_samples(self, iteration: int, columns: Mapping[str, Any]) -> None:
        """samples/iteration-00012.parquet: one row per sample."""
        write_samples(self.path, iteration, dict(columns))

    def write_grid(
        self, version: int, images: np.ndarray, prompts: Sequence[str], scores: np.ndarray
    ) -> None:
        """images/step-00012.png: the same prompts and seeds for every version."""
        titles = [f"{prompt} ({score:.2f})" for prompt, score in zip(prompts, scores, strict=True)]
        columns = min(8, len(images))
        picture = grid(images, columns, titles=titles, header=f"after {version} iterations")
        save_png(self.path / "images" / f"step-{version:05d}.png", picture)
        self.metrics.add_image("eval/images", picture, version)

    def write_adapter(self, files: Mapping[str, bytes], card: ModelCardInfo) -> Path:
        """adapter/: the exported files and a model card."""
        folder = self.path / "adapter"
        for name, data in files.items():
            atomic_write_bytes(folder / name, data)
        atomic_write_text(folder / "README.md", model_card(card))
        return folder

    def write_evaluation(
        self,
        summary: Mapping[str, Any],
        columns: Mapping[str, Any],
        rows: Sequence[tuple[str, np.ndarray]],
        titles: Sequence[str],
        scores: Sequence[Sequence[float]],
    ) -> None:
        """evaluation/: summary.json, samples.parquet, comparison.png."""
        write_evaluation(self.path / "evaluation", summary, columns, rows, titles, scores)

    def report(self) -> Path:
        """report.html, from what lies in the directory."""
        return write_report(self.path)

    def close(self) -> None:
        self.metrics.close()


def write_evaluation(
    folder: Path,
    summary: Mapping[str, Any],
    columns: Mapping[str, Any],
    rows: Sequence[tuple[str, np.ndarray]],
    titles: Sequence[str],
    scores: Sequence[Sequence[float]],
) -> None:
    """Write an evaluation's summary.json, samples.parquet and comparison.png into `folder`."""
    atomic_write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    atomic_write_bytes(folder / "samples.parquet", to_parquet(columns))
    save_png(folder / "comparison.png", comparison(rows, titles, scores=scores))


def read_config(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of an existing run, with placement fields overridden.

    Raises:
        RunDirectoryError: not a run.
        ConfigError: an override changes what affects the result.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise RunDirectoryError(f"{run_dir} is not a run: it holds no config.yaml")
    try:
        before = load_config(file)
    except ConfigError as error:
        raise RunDirectoryError(f"{file} is damaged or of another version: {error}") from None
    now = load_config(file, [*overrides, f"run_dir={run_dir.absolute()}"])
    check_same(before, now, run_dir)
    return now


def check_resumable(config: Config) -> None:
    """Raise RunDirectoryError unless `config.run_dir` is a run of the same configuration."""
    path = Path(config.run_dir)
    check_same(read_config(path), config, path)


def check_same(before: Config, now: Config, run_dir: Path) -> None:
    """Raise RunDirectoryError naming the result-affecting fields in which two configs differ."""
    old, new = _flat(before.placement_free()), _flat(now.placement_free())
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if different:
        lines = [f"  {key}: was {old.get(key)!r}, now {new.get(key)!r}" for key in different]
        raise RunDirectoryError(
            "\n".join(
                [
                    f"{run_dir} is a run of another configuration; to resume it, keep:",
                    *lines,
                ]
            )
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {
            k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}{name}.").items()
        }
    if isinstance(tree, list) and tree:
        return {k: v for i, sub in enumerate(tree) for k, v in _flat(sub, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): tree}
