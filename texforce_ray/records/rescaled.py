"""Reward weights changed on resume: values on the old scale must not mix with those on the new.

A total is a weighted sum, so totals from before a change are not comparable with later ones:
neither a prompt's remembered totals, nor the best evaluation so far, nor the reward's curve.
"""

from __future__ import annotations

import re
from pathlib import Path

from texforce_ray.config import Config
from texforce_ray.files import from_json
from texforce_ray.records.checkpoint import Checkpoint, forget_best, read_best

_WEIGHT = re.compile(r"rewards\.\d+\.weight")


def reward_weights(config: Config) -> dict[str, float]:
    """Weight of each reward; two totals are comparable if these are equal."""
    return {reward.key: reward.weight for reward in config.rewards}


def last_change(run_dir: Path) -> int:
    """Number of finished iterations at the last weight change; 0 if there was none."""
    try:
        lines = [from_json(line) for line in (run_dir / "changes.jsonl").read_text().splitlines()]
        found = [int(x["after_iteration"]) for x in lines if _WEIGHT.fullmatch(str(x["key"]))]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return max(found, default=0)


def drop_old_totals(
    run_dir: Path, config: Config, checkpoint: Checkpoint
) -> tuple[dict[str, list[float]], list[str]]:
    """Drop a resumed run's totals on the old scale. Its changes must already be recorded.

    Returns:
        The remembered totals that still apply, and a message about each thing dropped.
    """
    weights = reward_weights(config)
    remembered, messages = checkpoint.prompt_statistics, []
    if remembered and checkpoint.reward_weights != weights:
        messages.append(
            "reward weights have changed: dropping the remembered totals of "
            f"{len(remembered)} prompts, which are on the old scale; advantages start from the "
            "batch's statistics again"
        )
        remembered = {}
    best = read_best(run_dir)
    if best and best["weights"] != weights:
        messages.append(
            f"reward weights have changed: the best evaluation so far (iteration "
            f"{best['iteration']}, {best['score']:.3f}) is on the old scale and no longer counts"
        )
        forget_best(run_dir)
    return remembered, messages
