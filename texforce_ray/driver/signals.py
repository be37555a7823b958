"""Turns SIGINT and SIGTERM into the cancellation of the running task."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def cancel_on_signal() -> Iterator[None]:
    """Within the block, a signal cancels the current asyncio task.

    Enter it after `ray.init()`, which installs a handler of its own. Outside the main thread it
    does nothing: signals are not delivered there.
    """
    task = asyncio.current_task()
    if task is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def stop() -> None:
        # Ignore further signals: they must not interrupt the writing of the checkpoint.
        for number in SIGNALS:
            loop.add_signal_handler(number, lambda: None)
        task.cancel()

    for number in SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, previous[number])
