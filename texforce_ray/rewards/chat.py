"""Questions with images to any OpenAI-compatible endpoint, within a budget."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from texforce_ray.errors import RewardError
from texforce_ray.rewards.images import enlarged, to_png
from texforce_ray.rewards.web import JsonClient, RejectedError

_FIELDS = ("max_tokens", "temperature", "seed")


class ChatClient:
    """One model behind one endpoint; thread-safe.

    url: of the API, e.g. http://localhost:8000/v1. max_cost: what may be spent, with input_price
    and output_price per million tokens. max_requests: how many requests may be made. When either
    is used up, every further question raises. min_side: images are enlarged to it. max_tokens,
    temperature, seed: None omits the field, for services that reject it. extra_body: more fields
    of the request, which override ours.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        connections: int = 8,
        timeout_s: float = 60.0,
        retries: int = 3,
        max_tokens: int | None = 256,
        temperature: float | None = 0,
        seed: int | None = 0,
        extra_body: Mapping[str, Any] | None = None,
        max_cost: float | None = None,
        input_price: float = 0.0,
        output_price: float = 0.0,
        max_requests: int | None = None,
        min_side: int = 224,
        pause_s: float = 0.5,
    ) -> None:
        if max_cost is not None and not (input_price or output_price):
            raise RewardError("vlm: max_cost needs input_price and output_price")
        headers = {}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise RewardError(f"vlm: the environment variable {api_key_env} is not set")
            headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self.client = JsonClient(
            url.rstrip("/") + "/chat/completions",
            timeout_s=timeout_s,
            retries=retries,
            headers=headers,
            connections=connections,
            pause_s=pause_s,
        )
        if extra_body is not None and not isinstance(extra_body, Mapping):
            raise RewardError(f"vlm: extra_body: {extra_body!r} should be a mapping of fields")
        if taken := {"model", "messages", "stream"} & set(extra_body or {}):
            raise RewardError(f"vlm: extra_body: {sorted(taken)[0]!r} cannot be set there")
        self.model, self.min_side = model, min_side
        ours = zip(_FIELDS, (max_tokens, temperature, seed), strict=True)
        self.fields = {name: value for name, value in ours if value is not None}
        self.fields |= extra_body or {}
        self.max_cost, self.max_requests = max_cost, max_requests
        self.prices = input_price / 1e6, output_price / 1e6
        self.cost, self.requests = 0.0, 0
        self._lock = threading.Lock()

    def ask(self, question: str, images: Sequence[np.ndarray]) -> str:
        """The answer to a question about images, uint8 [H, W, 3] each; "" if it holds no text.

        Raises:
            RewardError: the budget is used up, or the service rejected the request.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        for image in images:
            data = f"data:image/png;base64,{to_png(enlarged(image, self.min_side))}"
            content.append({"type": "image_url", "image_url": {"url": data}})
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            **self.fields,
        }
        self._spend()
        try:
            return self._text(self.client.post(body))
        except RejectedError as error:
            raise RewardError(f"{error}{self._advice(str(error))}") from None

    def _advice(self, rejection: str) -> str:
        """Which setting to change, if the rejection names a field that was sent."""
        named = [name for name in self.fields if re.search(rf"\b{name}\b", rejection)]
        advice = [f"{name}: null" for name in named if name in _FIELDS]
        if "max_completion_tokens" in rejection and "max_tokens" in self.fields:
            advice.append("extra_body: {max_completion_tokens: 2048}")
        advice += [f"extra_body without {name}" for name in named if name not in _FIELDS]
        if not advice:
            return ""
        return (
            f"; set {', '.join(advice)} (for a reward, in its kwargs; for the judge command, with "
            "--max-tokens, --temperature, --request-seed and --extra-body)"
        )

    def _spend(self) -> None:
        with self._lock:
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise RewardError(f"max_requests: all {self.max_requests} are used up")
            if self.max_cost is not None and self.cost >= self.max_cost:
                raise RewardError(f"max_cost: {self.cost:.4f} of {self.max_cost} is spent")
            self.requests += 1

    def _text(self, answer: Any) -> str:
        try:
            text = answer["choices"][0]["message"]["content"]
            usage = answer.get("usage") or {}
            spent = self.prices[0] * usage.get("prompt_tokens", 0)
            spent += self.prices[1] * usage.get("completion_tokens", 0)
        except (KeyError, IndexError, TypeError, AttributeError):
            return ""
        with self._lock:
            self.cost += spent
        return text if isinstance(text, str) else ""
