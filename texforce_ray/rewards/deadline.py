"""The time by which a reward must have answered, for whatever it calls in turn. Needs nothing.

A reward server is killed when a call takes longer than `timeout_s`. Web clients therefore ask here
how long they may wait, and give up a little earlier: the call then fails with the service's own
words, and the server lives.
"""

from __future__ import annotations

import math
import time

_SHARE, _MOST_S = 0.1, 10.0  # kept back for the answer's way home
_end = math.inf


def begin(timeout_s: float) -> None:
    """A call begins that is given `timeout_s` seconds; one process answers one call at a time."""
    global _end  # noqa: PLW0603 - threads of a reward must see it, so it is no context variable
    _end = time.monotonic() + timeout_s - min(_SHARE * timeout_s, _MOST_S)


def end() -> None:
    """The call is over."""
    global _end  # noqa: PLW0603
    _end = math.inf


def left() -> float:
    """Seconds that a reward still has; infinite outside a reward server."""
    return _end - time.monotonic()
