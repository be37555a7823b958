"""A vision-language model as the judge, behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from texforce_ray.errors import RewardError
from texforce_ray.rewards.images import enlarged, to_png
from texforce_ray.rewards.web import JsonClient

log = logging.getLogger(__name__)

_RUBRIC = (
    "You judge images made from a text. Text: {prompt}\n"
    "Does the image show what the text asks for, every object, number, colour and position of it? "
    'Answer with JSON alone: {{"score": x}}, x from 0 (nothing) to 10 (everything).'
)


class VlmJudge:
    """Scores by a rubric in plain words.

    url: of the API, e.g. http://localhost:8000/v1. model: its name there. rubric: `{prompt}` stands
    for the prompt, other braces are doubled; it should ask for JSON with "score". low, high: what
    the rubric promises; an answer outside is not a score. concurrency: requests at once. retries:
    of a request, and of an answer without a score. max_cost: what this server may spend, by input_
    and output_price for a million tokens; max_requests: or how many requests it may make. When
    either is used up, nothing more is scored and the run ends with that message.
    """

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str = _RUBRIC,
        low: float = 0.0,
        high: float = 10.0,
        api_key_env: str | None = None,
        concurrency: int = 8,
        timeout_s: float = 60.0,
        retries: int = 3,
        max_tokens: int = 256,
        max_cost: float | None = None,
        input_price: float = 0.0,
        output_price: float = 0.0,
        max_requests: int | None = None,
        min_side: int = 224,
        pause_s: float = 0.5,
    ) -> None:
        if max_cost is not None and not (input_price or output_price):
            raise RewardError("reward vlm: max_cost needs input_price and output_price")
        try:
            rubric.format(prompt="")
        except (KeyError, IndexError, ValueError) as error:
            raise RewardError(
                f"reward vlm: rubric: {{prompt}} is the only field, other braces are doubled; "
                f"found {error!r}"
            ) from None
        headers = {}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise RewardError(f"reward vlm: the environment variable {api_key_env} is not set")
            headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self.client = JsonClient(
            url.rstrip("/") + "/chat/completions",
            timeout_s=timeout_s,
            retries=retries,
            headers=headers,
            connections=concurrency,
            pause_s=pause_s,
        )
        self.model, self.rubric, self.low, self.high = model, rubric, low, high
        self.retries, self.max_tokens, self.min_side = retries, max_tokens, min_side
        self.max_cost, self.max_requests = max_cost, max_requests
        self.prices = input_price / 1e6, output_price / 1e6
        self.cost, self.requests = 0.0, 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(concurrency)

    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Scores of uint8 [B, H, W, 3]; NaN where no try gave an answer with a score.

        Raises:
            RewardError: the budget is used up, or the service refused every image.
        """
        del metadata
        jobs = [
            self._threads.submit(self._judge, i, p) for i, p in zip(images, prompts, strict=True)
        ]
        scores, problem = [], None
        for job in jobs:
            try:
                scores.append(job.result())
            except RewardError as error:
                problem = error
                scores.append(math.nan)
        if problem is not None and all(math.isnan(score) for score in scores):
            raise problem
        return scores

    def _judge(self, image: np.ndarray, prompt: str) -> float:
        data = f"data:image/png;base64,{to_png(enlarged(image, self.min_side))}"
        content = [
            {"type": "text", "text": self.rubric.format(prompt=prompt)},
            {"type": "image_url", "image_url": {"url": data}},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": self.max_tokens,
        }
        answer = ""
        for _ in range(self.retries + 1):
            self._spend()
            answer = self._text(self.client.post(body))
            score = parse_score(answer)
            if score is not None and self.low <= score <= self.high:
                return score
        log.warning("no score from %g to %g in: %.200s", self.low, self.high, answer)
        return math.nan

    def _spend(self) -> None:
        with self._lock:
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise RewardError(f"max_requests: {self.max_requests} are used up")
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


def parse_score(text: str) -> float | None:
    """The score of an answer: JSON with "score", or "score: 7", or a bare number; else None."""
    found = None
    for match in re.finditer(r"\{[^{}]*\}", text):
        try:
            found = float(json.loads(match.group())["score"])
        except (ValueError, KeyError, TypeError):
            continue
    if found is None:
        number = r"(-?\d+(?:\.\d+)?)"
        labelled = re.findall(rf"\bscore\b[^\d\-]{{0,20}}{number}", text, re.IGNORECASE)
        bare = re.fullmatch(rf"\W*?{number}(?:\s*/\s*\d+)?\W*", text.strip())
        if labelled:
            found = float(labelled[-1])
        elif bare:
            found = float(bare.group(1))
    return found if found is not None and math.isfinite(found) else None
