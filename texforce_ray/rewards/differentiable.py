"""The weighted sum of differentiable rewards, loaded into the process that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from texforce_ray.config import RewardConfig
from texforce_ray.errors import RewardError
from texforce_ray.rewards import arguments, resolve
from texforce_ray.rewards.base import DifferentiableReward, load_reward


def total_of(
    rewards: Sequence[RewardConfig], device: str
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Sum of weight x score_differentiable over all rewards with a weight: images, prompts to [B].

    Raises:
        RewardError: a reward that cannot be loaded here, or has no gradient.
    """
    parts = [(reward.weight, _load(reward, device)) for reward in rewards if reward.weight]

    def total(images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = [weight * part.score_differentiable(images, prompts) for weight, part in parts]
        return sum(scores[1:], scores[0])

    return total


def _load(reward: RewardConfig, device: str) -> DifferentiableReward:
    kwargs = arguments(reward.name, reward.kwargs)
    if reward.name is not None:
        # On the policy's device unless the config says otherwise: every built-in one takes it.
        kwargs = {"device": device} | kwargs
    loaded = load_reward(resolve(reward.name, reward.target), kwargs)
    if not isinstance(loaded, DifferentiableReward):
        raise RewardError(
            f"objective.kind 'direct': reward {reward.key} has no method "
            "score_differentiable(images, prompts); give it one, or weight 0, or train with PPO "
            "(objective.kind: ppo)"
        )
    return loaded
