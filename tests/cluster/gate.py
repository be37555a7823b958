"""A reward that holds a run back until a file is there, so that a test can act in between."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


class Gate:
    """Scores 0, once `path` exists or `patience` seconds have gone by."""

    def __init__(self, path: str, patience: float = 120.0) -> None:
        self.path, self.patience = Path(path), patience

    def score(self, images: Any, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        deadline = time.monotonic() + self.patience
        while not self.path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return [0.0] * len(prompts)
