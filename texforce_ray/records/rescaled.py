"""Weights of rewards that are changed on resume: nothing of the old scale meets the new one.

A total is a weighted sum, so totals from before a change cannot be compared with those after it:
neither a prompt's remembered totals, nor the best evaluation so far, nor the reward's curve.
"""

from __future__ import annotations

import re
from pathlib import Path

from texforce_ray.config import Config
from texforce_ray.records.checkpoint import Checkpoint, forget_best, read_best
from texforce_ray.records.files import from_json

_WEIGHT = re.compile(r"rewards\.\d+\.weight")


def reward_weights(config: Config) -> dict[str, float]:
    """Weight of each reward: two totals can be compared if these are equal."""
    return {reward.key: reward.weight for reward in config.rewards}


def last_change(run_dir: Path) -> int:
    """Finished iterations when a weight was last changed; 0 if none ever was."""
    try:
        lines = [from_json(line) for line in (run_dir / "changes.jsonl").read_text().splitlines()]
        found = [int(x["after_iteration"]) for x in lines if _WEIGHT.fullmatch(str(x["key"]))]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return max(found, default=0)


def drop_old_totals(
    run_dir: Path, config: Config, checkpoint: Checkpoint
) -> tuple[dict[str, list[float]], list[str]]:
    """What of a resumed run's totals still holds, after its changes have been recorded.

    Returns:
        The prompts' remembered totals, and a message about each thing that was dropped.
    """
    weights, changed = reward_weights(config), last_change(run_dir)

    def old(stored: dict[str, float], iteration: int) -> bool:
        # Files of versions that did not store weights: what the record of changes says.
        return stored != weights if stored else changed > 0 and iteration <= changed

    remembered, said = checkpoint.prompt_statistics, []
    if remembered and old(checkpoint.reward_weights, checkpoint.iteration):
        said.append(
            "rewards' weights have changed: the remembered totals of "
            f"{len(remembered)} prompts are on the old scale and are dropped; advantages start "
            "from the batch's statistics again"
        )
        remembered = {}
    best = read_best(run_dir)
    if best and old(best["weights"], best["iteration"]):
        said.append(
            f"rewards' weights have changed: the best evaluation so far (iteration "
            f"{best['iteration']}, {best['score']:.3f}) is on the old scale and no longer counts"
        )
        forget_best(run_dir)
    return remembered, said
