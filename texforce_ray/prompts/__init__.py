"""Prompts: built-in sets, files, and which of them an iteration uses.

No torch, no Ray. May import shapes (the built-in sets), the config and the modules below them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from texforce_ray import randomness
from texforce_ray.config import PromptSource
from texforce_ray.errors import PromptError
from texforce_ray.prompts.readers import read_records
from texforce_ray.prompts.sets import BUILT_IN


@dataclass(frozen=True)
class Prompt:
    """A prompt's text and its record's other fields, as plain JSON data; rewards see both."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load_prompts(source: PromptSource) -> list[Prompt]:
    """All prompts of a set, file, folder or data set, in its order.

    Raises:
        PromptError: unknown set; missing, unreadable or empty file; no such column; a value that
            is not text.
    """
    if source.set is not None:
        if source.set not in BUILT_IN:
            raise PromptError(
                f"unknown prompt set {source.set!r}; the built-in sets are {', '.join(BUILT_IN)}"
            )
        prompts = [Prompt(text) for text in BUILT_IN[source.set]()]
    else:
        prompts = [Prompt(text, metadata) for text, metadata in read_records(source)]
    kept = [prompt for prompt in prompts if _wanted(prompt.text, source)]
    if not kept:
        name = source.set or source.path or source.dataset
        raise PromptError(
            f"none of the {len(prompts)} prompts of {name} is left after "
            f"min_words={source.min_words}, max_words={source.max_words}, part={source.part}"
        )
    return kept[: source.limit]


def _wanted(text: str, source: PromptSource) -> bool:
    words = len(text.split())
    if words < source.min_words or (source.max_words is not None and words > source.max_words):
        return False
    if source.part == "all":
        return True
    # The text alone decides, so adding prompts to a file moves none of the others.
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return (place < source.test_share) == (source.part == "test")


def prompts_of_iteration(
    prompts: list[Prompt], seed: int, iteration: int, count: int
) -> list[Prompt]:
    """`count` prompts: without replacement within each epoch, a pure function of the arguments."""
    chosen = []
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, place = divmod(position, len(prompts))
        chosen.append(prompts[_order(len(prompts), seed, epoch)[place]])
    return chosen


@lru_cache(maxsize=4)  # usually covers the epochs that an iteration and its evaluation use
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return randomness.generator(seed, randomness.PROMPTS, epoch).permutation(count)
