"""Awaits calls of actors: one, or several that work together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from texforce_ray.cluster.answers import GONE, device_fault
from texforce_ray.errors import DeviceError, PeerLostError

Result = tuple[Any, tuple[ray.ObjectRef, ...]]

SETTLE_S = 10.0  # after one of several calls fails, for the others to fail as well


async def answer(refs: Any, timeout: float) -> Result:
    """A call's first result, and the refs of the others.

    Raises:
        DeviceError: the actor's GPU failed; Ray reports it as an error of the task.
    """
    first, *rest = refs if isinstance(refs, Sequence) else [refs]
    try:
        async with asyncio.timeout(timeout):
            return await asyncio.wrap_future(first.future()), tuple(rest)
    except RayTaskError as error:
        if fault := device_fault(error):
            raise fault from None
        raise


async def together(answers: Sequence[asyncio.Future[Result]]) -> list[Result]:
    """All answers. A lost peer is reported before the death that caused it: wait for that one."""
    try:
        return await asyncio.gather(*answers)
    except RayTaskError as error:
        if not isinstance(error.cause, PeerLostError):
            raise
        await asyncio.wait(answers, timeout=SETTLE_S)
        causes = [call.exception() for call in answers if failed(call)]
        raise (causes[0] if causes and causes[0] else TimeoutError()) from None
    finally:
        for answer in answers:
            answer.cancel()


def failed(answer: asyncio.Future[Any]) -> bool:
    """Whether the actor is at fault: dead, or with a broken device."""
    return died(answer) or raised(answer, DeviceError)


def died(answer: asyncio.Future[Any]) -> bool:
    return raised(answer, *GONE)


def raised(answer: asyncio.Future[Any], *kinds: type[BaseException]) -> bool:
    return answer.done() and not answer.cancelled() and isinstance(answer.exception(), kinds)
