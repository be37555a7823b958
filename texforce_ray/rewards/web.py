"""Calls of web services by rewards: deadlines, retries with growing pauses, bounded answers."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import httpx

from texforce_ray.errors import RewardError

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
MAX_ANSWER = 4_000_000  # bytes; a service gone wild must not fill the memory


class JsonClient:
    """POSTs JSON to one service and reads JSON back."""

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
            raise RewardError(f"url {url!r} should begin with http:// or https://")
        self.url, self.retries, self.timeout_s = url, retries, timeout_s
        self.max_answer, self.pause_s = max_answer, pause_s
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self.client = httpx.Client(timeout=timeout_s, headers=headers, limits=limits)

    def post(self, body: Any) -> Any:
        """The answer, after at most `retries` further tries; thread-safe.

        Raises:
            RewardError: with the service's last word.
        """
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause_s * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
            try:
                code, data = self._once(body)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if code in _AGAIN:
                problem = f"HTTP {code}: {data[:300].decode(errors='replace')}"
                continue
            if code >= 400:
                raise RewardError(f"{self.url}: HTTP {code}: {data[:300].decode(errors='replace')}")
            try:
                return json.loads(data)
            except ValueError:
                problem = f"the answer is not JSON: {data[:100].decode(errors='replace')!r}"
        raise RewardError(f"{self.url}: {problem} (after {self.retries + 1} tries)")

    def _once(self, body: Any) -> tuple[int, bytes]:
        # httpx's timeout is for each read: a service that dribbles would hold on for ever.
        deadline = time.monotonic() + self.timeout_s
        with self.client.stream("POST", self.url, json=body) as answer:
            data = b""
            for part in answer.iter_bytes():
                data += part
                if len(data) > self.max_answer:
                    raise RewardError(
                        f"{self.url}: the answer is larger than {self.max_answer:,} bytes"
                    )
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"no whole answer within {self.timeout_s:g} s")
            return answer.status_code, data
