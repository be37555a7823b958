"""Stand-in actors that break from within when a trap is set: a file, removed by the first actor
that sees it.

    TRAPS/ROLE-WHAT    role: rollout, reward, learner

WHAT: `exits` before its work, `exits-returning` after it, `raises`, `slow` (beyond its deadline),
`memory` (takes memory until Ray ends it).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from texforce_ray.testing import stand_ins

FOLDER = "TEXFORCE_TRAPS"  # environment variable
SLOW_S = 7.0
REWARD = "traps:TrappedReward"  # as `target` of a reward


def sprung(role: str, what: str) -> bool:
    """Whether this trap was set; only one actor finds it."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return False
    try:
        Path(folder, f"{role}-{what}").unlink()
    except OSError:
        return False
    return True


def look(role: str) -> None:
    """Break as the trap that is set demands, if there is one."""
    if sprung(role, "exits"):
        os._exit(3)
    if sprung(role, "raises"):
        raise ValueError("a trap was set")
    if sprung(role, "slow"):
        time.sleep(SLOW_S)
    if sprung(role, "memory"):
        _take_memory()


def look_after(role: str) -> None:
    if sprung(role, "exits-returning"):
        os._exit(3)


def _take_memory(most: int = 7 * 2**30, step: int = 2**28) -> None:
    taken = []
    for _ in range(most // step):
        taken.append(b"\1" * step)
        time.sleep(0.02)
    time.sleep(5)  # Ray looks every 250 ms
    print("nothing ended this process for its memory", file=sys.stderr)


class TrappedRollout(stand_ins.StandInRollout):
    def sample(self, *given: Any) -> Any:
        look("rollout")
        made = super().sample(*given)
        look_after("rollout")
        return made


class TrappedLearner(stand_ins.StandInLearner):
    def update(self, *given: Any) -> Any:
        look("learner")
        made = super().update(*given)
        look_after("learner")
        return made


class TrappedReward(stand_ins.Brightness):
    def score(self, *given: Any) -> list[float]:
        look("reward")
        scores = super().score(*given)
        look_after("reward")
        return scores
