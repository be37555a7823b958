"""A vision-language model as the judge, behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from texforce_ray.errors import RewardError
from texforce_ray.rewards.answers import parse_score
from texforce_ray.rewards.chat import ChatClient

log = logging.getLogger(__name__)

_RUBRIC = (
    "You judge images made from a text. Text: {prompt}\n"
    "Does the image show what the text asks for, every object, number, colour and position of it? "
    'Answer with JSON alone: {{"score": x}}, x from 0 (nothing) to 10 (everything).'
)


class VlmJudge:
    """Scores by a rubric in plain words.

    url: of the API, e.g. http://localhost:8000/v1. model: its name there. rubric: `{prompt}` stands
    for the prompt, double any other braces; it should ask for JSON with "score". low, high: the
    rubric's range; an answer outside it is not a score. concurrency: requests at once. retries: of
    a request, and of an answer without a score. max_tokens, temperature, seed: of the request;
    null omits the field, for services that reject it. extra_body: more fields of the request, e.g.
    {max_completion_tokens: 2048}. max_cost: what this server may spend, with input_price and
    output_price per million tokens. max_requests: how many requests it may make. When either is
    used up, nothing more is scored and the run ends with that message.
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
        max_tokens: int | None = 256,
        temperature: float | None = 0,
        seed: int | None = 0,
        extra_body: dict[str, Any] | None = None,
        max_cost: float | None = None,
        input_price: float = 0.0,
        output_price: float = 0.0,
        max_requests: int | None = None,
        min_side: int = 224,
        pause_s: float = 0.5,
    ) -> None:
        try:
            rubric.format(prompt="")
        except (KeyError, IndexError, ValueError) as error:
            raise RewardError(
                f"reward vlm: rubric: {{prompt}} is the only field allowed, got {error!r}; double "
                "all other braces"
            ) from None
        self.chat = ChatClient(
            url,
            model,
            api_key_env=api_key_env,
            connections=concurrency,
            timeout_s=timeout_s,
            retries=retries,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            extra_body=extra_body,
            max_cost=max_cost,
            input_price=input_price,
            output_price=output_price,
            max_requests=max_requests,
            min_side=min_side,
            pause_s=pause_s,
        )
        self.rubric, self.low, self.high, self.retries = rubric, low, high, retries
        self._threads = ThreadPoolExecutor(concurrency)

    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Scores of uint8 [B, H, W, 3]; NaN where no attempt returned a score.

        Raises:
            RewardError: the budget is used up, or the service rejected every image.
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
        question = self.rubric.format(prompt=prompt)
        answer = ""
        for _ in range(self.retries + 1):
            answer = self.chat.ask(question, [image])
            score = parse_score(answer, self.high)
            if score is not None and self.low <= score <= self.high:
                return score
        log.warning("no score from %g to %g in: %.200s", self.low, self.high, answer)
        return math.nan
