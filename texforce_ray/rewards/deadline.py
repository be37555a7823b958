"""The time by which a reward must answer, for the services that it calls. No dependencies.

A reward server is killed when a call takes longer than `timeout_s`. Web clients therefore ask here
how long they may wait, and give up a little earlier: the call then fails with the service's own
error message, and the server survives.
"""

from __future__ import annotations

import math
import time

_SHARE, _MOST_S = 0.1, 10.0  # reserved for returning the answer
_end = math.inf


def begin(timeout_s: float) -> None:
    """Start a call that may take `timeout_s` seconds; a process answers one call at a time."""
    global _end  # noqa: PLW0603 - not a context variable: a reward's threads must see it
    _end = time.monotonic() + timeout_s - min(_SHARE * timeout_s, _MOST_S)


def end() -> None:
    """End the call."""
    global _end  # noqa: PLW0603
    _end = math.inf


def left() -> float:
    """Seconds that a reward has left; infinite outside a reward server."""
    return _end - time.monotonic()
