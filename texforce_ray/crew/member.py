"""One actor of a pool, as live status shows it."""

from __future__ import annotations

from dataclasses import dataclass

from texforce_ray.actors.messages import Whereabouts


@dataclass(frozen=True)
class Member:
    """One actor, as live status shows it.

    state: 'busy', 'idle', 'starting' (or waiting for room), 'gone' (permanently). where: set once
    it has started. doing: its current task, `seconds`: for how long.
    """

    name: str
    state: str
    where: Whereabouts | None = None
    doing: str = ""
    seconds: float = 0.0
