"""Rewards' calls to web services: deadlines, retries with growing pauses, bounded answers."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import httpx

from texforce_ray.errors import RewardError, redacted
from texforce_ray.rewards import deadline

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
MAX_ANSWER = 4_000_000  # bytes; a misbehaving service must not fill the memory


class RejectedError(RewardError):
    """The service rejected the request; retrying would not help."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class JsonClient:
    """POSTs JSON to one service and reads JSON back.

    timeout_s: for one attempt. All attempts together end before the reward's own deadline.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        retries: int,
        headers: dict[str, str] | None = None,
        connections: int = 8,
        max_answer: int = MAX_ANSWER,
        pause_s: float = 0.5,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise RewardError(f"url {redacted(url)!r} should begin with http:// or https://")
        self.url, self.shown = url, redacted(url)
        self.retries, self.timeout_s = retries, timeout_s
        self.max_answer, self.pause_s = max_answer, pause_s
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self.client = httpx.Client(timeout=timeout_s, headers=headers, limits=limits)

    def post(self, body: Any) -> Any:
        """The answer, after at most `retries` retries; thread-safe.

        Raises:
            RejectedError: the service rejects the request.
            RewardError: no usable answer; quotes the last problem.
        """
        problem, tries = "no request was sent", 0
        for attempt in range(self.retries + 1):
            pause = self.pause_s * 2 ** (attempt - 1) * random.uniform(0.8, 1.2) if attempt else 0.0
            if deadline.left() <= pause:
                problem += "; no time is left before the reward's timeout_s"
                break
            time.sleep(pause)
            tries += 1
            try:
                code, data = self._once(body)
            except httpx.HTTPError as error:
                problem = redacted(f"{type(error).__name__}: {error}")
                continue
            if code in _AGAIN:
                problem = f"HTTP {code}: {data[:300].decode(errors='replace')}"
                continue
            if code >= 400:
                words = data[:300].decode(errors="replace")
                raise RejectedError(f"{self.shown}: HTTP {code}: {words}", code)
            try:
                return json.loads(data)
            except ValueError:
                problem = f"the answer is not JSON: {data[:100].decode(errors='replace')!r}"
        raise RewardError(f"{self.shown}: {problem} (after {tries} tries)")

    def _once(self, body: Any) -> tuple[int, bytes]:
        # httpx's timeout is per read: a service that sends byte by byte would block forever.
        seconds = min(self.timeout_s, max(0.001, deadline.left()))
        end = time.monotonic() + seconds
        with self.client.stream("POST", self.url, json=body, timeout=seconds) as answer:
            data = b""
            for part in answer.iter_bytes():
                data += part
                if len(data) > self.max_answer:
                    raise RewardError(
                        f"{self.shown}: the answer is larger than {self.max_answer:,} bytes"
                    )
                if time.monotonic() > end:
                    raise httpx.ReadTimeout(f"no complete answer within {seconds:.3g} s")
            return answer.status_code, data
