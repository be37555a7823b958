"""How every command ends: with an exit code, and one message for an error users can act on."""

from __future__ import annotations

import sys
from collections.abc import Callable

from texforce_ray.errors import Interrupted, TexForceError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # the shells' convention: 128 + SIGINT


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command's body; returns its exit code, or 0 if it returns none."""
    try:
        return command() or 0
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except TexForceError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return EXIT_ERROR
