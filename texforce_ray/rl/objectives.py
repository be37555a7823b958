"""Objectives by `objective.kind`: each is a subclass of `Learner`."""

from __future__ import annotations

import importlib

from texforce_ray.config import Config
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.learner import Learner

OBJECTIVES = {
    "ppo": "texforce_ray.rl.ppo_learner:PpoLearner",
    "direct": "texforce_ray.rl.direct_learner:DirectLearner",
    "nft": "texforce_ray.rl.nft_learner:NftLearner",
    "awm": "texforce_ray.rl.awm_learner:AwmLearner",
    "rwr": "texforce_ray.rl.weighted_learner:WeightedLearner",
    "raft": "texforce_ray.rl.weighted_learner:WeightedLearner",
}


def learner_class(config: Config) -> type[Learner]:
    """The class of the configured objective.

    Raises:
        ConfigError: the class cannot be imported, or is not a `Learner`.
    """
    own = getattr(config.objective, "target", None)
    target = own or OBJECTIVES[config.objective.kind]
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"objective.target: {target!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Learner)):
        raise ConfigError(
            f"objective.target: {target!r} is not a subclass of texforce_ray.rl.learner.Learner"
        )
    return found


def make_learner(backbone: Backbone, config: Config) -> Learner:
    """A learner of the configured objective."""
    return learner_class(config)(backbone, config)
