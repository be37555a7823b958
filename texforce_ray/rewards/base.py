"""The interface of rewards. Needs only numpy: rewards may run in environments without torch."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from texforce_ray.errors import RewardError, redacted, secrets

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Reward(Protocol):
    """Anything with a `score` method of this form; it need not inherit from this class."""

    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Sequence[float]:
        """One finite number per image, higher is better; NaN means "could not score".

        Args:
            images: uint8 [B, H, W, 3], read-only.
            prompts: B texts.
            metadata: B mappings, the other fields of the prompt file.
        """
        ...


@runtime_checkable
class DifferentiableReward(Reward, Protocol):
    """A reward that can also be maximized by its gradient (objective.kind 'direct')."""

    def score_differentiable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores of `score`, with a gradient to the images.

        Args:
            images: float [B, 3, H, W] in [0, 1], on the learner's device.
            prompts: B texts.

        Returns:
            float [B].
        """
        ...


def load_reward(target: str, kwargs: dict[str, Any]) -> Reward:
    """Import 'package.module:Class' and create an instance.

    Raises:
        RewardError: naming the target and why it cannot be used.
    """
    module_name, _, class_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # user code may raise anything; the message must name it
        raise RewardError(
            f"reward {target}: cannot import {module_name}: {type(error).__name__}: {error}"
        ) from error
    reward_class = getattr(module, class_name, None)
    if reward_class is None:
        raise RewardError(f"reward {target}: {module_name} has no class {class_name}")
    if not callable(getattr(reward_class, "score", None)):
        raise RewardError(
            f"reward {target}: {class_name} has no method score(images, prompts, metadata)"
        )
    try:
        return reward_class(**kwargs)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = (
            f"reward {target}: {class_name}(**{kwargs}) failed: {type(error).__name__}: {error} "
            f"({where.filename}:{where.lineno})"
        )
        # Not `from error`: Ray would print the cause too, with any secret that it quotes.
        raise RewardError(_without_secrets(message, kwargs)) from None


def _without_secrets(message: str, kwargs: dict[str, Any]) -> str:
    """A message that quotes a constructor's arguments, with secrets removed for the logs."""
    for secret in sorted(secrets(kwargs), key=len, reverse=True):
        message = message.replace(secret, "***")
    return redacted(message)


def checked_scores(scores: Any, count: int, name: str) -> list[float]:
    """Scores as plain floats, NaN allowed.

    Raises:
        RewardError: wrong length, infinite, or not numbers.
    """
    try:
        values = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward {name}: score() returned {type(scores).__name__}, which is not a list of "
            f"numbers ({error})"
        ) from None
    if len(values) != count:
        raise RewardError(
            f"reward {name}: score() returned {len(values)} numbers for {count} images"
        )
    if infinite := sum(value in (float("inf"), float("-inf")) for value in values):
        raise RewardError(
            f"reward {name}: score() returned {infinite} infinite numbers; use NaN for 'could "
            "not score'"
        )
    return values
