"""Rewards that misbehave; they run in reward servers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np


class Sleeper:
    """Never answers."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        time.sleep(10_000)
        return []


class SleepsOnce:
    """Hangs on its first call ever, wherever that is."""

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        if not self.marker.exists():
            self.marker.touch()
            time.sleep(10_000)
        return [1.0] * len(images)


class Dies:
    """Takes its process along."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        os._exit(3)


class ThirdNaN:
    """Cannot score every third image."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        return [float("nan") if i % 3 == 0 else 1.0 for i in range(len(images))]


class NeedsPackage:
    """Uses a package that the core does not have, from an environment of its own."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        import colormath  # noqa: F401 - only importable inside
        import numpy

        return [float(numpy.__version__.split(".", maxsplit=1)[0])] * len(images)


class BatchSize:
    """Scores each image by how many came in the call, and refuses black ones."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        if (images.reshape(len(images), -1).max(axis=1) == 0).any():
            raise ValueError("a black image")
        return [float(len(images))] * len(images)


class BrokenGpu:
    """Its process's CUDA context breaks at the first call ever, and stays broken."""

    def __init__(self, marker: str) -> None:
        self.marker, self.broken = Path(marker), False

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        if not self.marker.exists():
            self.marker.touch()
            self.broken = True
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [1.0] * len(images)


class Unwilling:
    """Quotes its arguments in its error, as clients do."""

    def __init__(self, api_key: str, url: str, size: int) -> None:
        raise ConnectionError(f"no answer from {url} with {api_key}")

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list:
        return []
