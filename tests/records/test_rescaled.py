"""A reward's weight that changes on resume: no total of the old scale meets one of the new."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.chaos.torture import checkpoint
from texforce_ray.config import Config
from texforce_ray.config.io import load_config
from texforce_ray.driver.recorder import Recorder
from texforce_ray.records.checkpoint import (
    Checkpoint,
    load_checkpoint,
    mark_best,
    read_best,
    save_checkpoint,
)
from texforce_ray.records.metrics import MetricsLog
from texforce_ray.records.rescaled import drop_old_totals, last_change, reward_weights
from texforce_ray.records.run_directory import RunDirectory, check_resumable, read_config

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
OLD = {"a red circle": [0.5, 0.6] * 8}


def _config(run_dir: Path, *overrides: str) -> Config:
    return load_config(SMOKE, [f"run_dir={run_dir}", *overrides])


def _begun(run_dir: Path) -> Checkpoint:
    """A run of three iterations."""
    config = _config(run_dir)
    RunDirectory.create(config, "digest").close()
    weights = reward_weights(config)
    state = replace(checkpoint(3), prompt_statistics=OLD, reward_weights=weights)
    path = save_checkpoint(run_dir, state)
    mark_best(run_dir, 3, 0.7, weights)
    return load_checkpoint(path)


def _resumed(run_dir: Path, start: int, *overrides: str) -> Config:
    config = read_config(run_dir, overrides)
    RunDirectory.reopen(config, start, check_resumable(config, "digest")).close()
    return config


def test_totals_and_best_of_the_old_weights_are_dropped_and_said_to_be(tmp_path: Path) -> None:
    restored = _begun(tmp_path)
    config = _resumed(tmp_path, 3, "rewards.0.weight=10")
    remembered, said = drop_old_totals(tmp_path, config, restored)
    assert remembered == {}
    assert read_best(tmp_path) is None
    assert "remembered totals of 1 prompts" in said[0]
    assert "0.700" in said[1]
    # Killed before its first checkpoint and resumed without a change: the weights are still new.
    mark_best(tmp_path, 3, 0.7, restored.reward_weights)
    again = _resumed(tmp_path, 3)
    assert drop_old_totals(tmp_path, again, restored)[0] == {}
    assert read_best(tmp_path) is None


def test_what_has_the_same_scale_is_kept(tmp_path: Path) -> None:
    restored = _begun(tmp_path)
    config = _resumed(tmp_path, 3, "optimizer.lr=1e-5")
    assert drop_old_totals(tmp_path, config, restored) == (OLD, [])
    assert read_best(tmp_path) is not None


def test_totals_made_with_the_new_weights_are_kept_from_then_on(tmp_path: Path) -> None:
    _begun(tmp_path)
    config = _resumed(tmp_path, 3, "rewards.0.weight=10")
    new = {"a red circle": [5.0, 6.0]}
    state = replace(checkpoint(4), prompt_statistics=new, reward_weights=reward_weights(config))
    restored = load_checkpoint(save_checkpoint(tmp_path, state))
    assert drop_old_totals(tmp_path, _resumed(tmp_path, 4), restored)[0] == new


def test_a_lower_score_of_the_new_scale_becomes_the_best_one(tmp_path: Path) -> None:
    mark_best(tmp_path, 3, 0.7, {"shapes": 1.0})
    assert not mark_best(tmp_path, 4, 0.1, {"shapes": 1.0})
    assert mark_best(tmp_path, 5, 0.1, {"shapes": 0.1})
    best: dict[str, Any] | None = read_best(tmp_path)
    assert best == {"iteration": 5, "score": 0.1, "weights": {"shapes": 0.1}}


def test_a_smaller_weight_is_no_collapse_of_the_reward(tmp_path: Path) -> None:
    _begun(tmp_path)
    line = {"reward/total_mean": 5.0, "reward/total_std": 0.1}
    with MetricsLog(tmp_path) as log:
        for iteration in range(6):
            log.append(iteration, line)
    config = _resumed(tmp_path, 6, "rewards.0.weight=0.1")
    assert last_change(tmp_path) == 6
    with RunDirectory.reopen(config, 6) as directory:
        watch = Recorder(config, directory)._alarms
    rescaled = {key: value / 10 for key, value in line.items()}
    said = [text for i in range(6, 12) for text in watch.look({"iteration": i, **rescaled})]
    assert said == []
    # What stays the same is still looked after.
    assert any(
        "fallen" in t
        for i in range(12, 18)
        for t in watch.look({"iteration": i, "reward/total_mean": 0.1, "reward/total_std": 0.01})
    )


def test_records_of_changes_that_are_damaged_tell_nothing(tmp_path: Path) -> None:
    assert last_change(tmp_path) == 0
    (tmp_path / "changes.jsonl").write_text(json.dumps({"key": "rewards.0.weight"}) + "\n{")
    assert last_change(tmp_path) == 0
    assert np.isfinite(last_change(tmp_path))
