"""Client of a reward service, by the protocol in docs/rewards.md; `serve.py` is the server."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from texforce_ray.errors import RewardError
from texforce_ray.rewards.images import to_png
from texforce_ray.rewards.web import JsonClient

PROTOCOL = 1


class HttpReward:
    """POSTs `{"version": 1, "images": [PNG in base64], "prompts": [...], "metadata": [...]}`.

    The service answers `{"scores": [...]}`: one number for each image, null for "could not score".
    token_env names the environment variable that holds a bearer token: the config has no secrets.
    """

    def __init__(
        self, url: str, timeout_s: float = 120.0, retries: int = 2, token_env: str | None = None
    ) -> None:
        headers = {}
        if token_env is not None:
            if token_env not in os.environ:
                raise RewardError(f"reward http: the environment variable {token_env} is not set")
            headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        self.client = JsonClient(url, timeout_s=timeout_s, retries=retries, headers=headers)

    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Scores of uint8 [B, H, W, 3] in one request.

        Raises:
            RewardError: no answer after all attempts, or one that breaks the protocol.
        """
        answer = self.client.post(
            {
                "version": PROTOCOL,
                "images": [to_png(image) for image in images],
                "prompts": prompts,
                "metadata": metadata,
            }
        )
        if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
            raise RewardError(f"{self.client.shown}: the answer has no list 'scores'")
        return [float("nan") if score is None else score for score in answer["scores"]]
