"""What the tests of objectives on the forward process share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.unit.learners import ADVANTAGES, EVERYONE, PROMPTS, SEEDS, configured
from texforce_ray.config import Config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.forward_learner import ForwardLearner
from texforce_ray.rl.sharding import UpdateBatch

Load = Callable[[], Backbone]
KINDS = {
    "nft": {"kind": "nft", "beta": 0.6, "advantage_max": 1.5},
    "rwr": {"kind": "rwr", "temperature": 0.7},
    "raft": {"kind": "raft", "best": 2},
    "awm": {"kind": "awm", "clip_range": 0.01},
}


def forward_config(kind: str, **sections: Any) -> Config:
    anchors = {"anchor_weight": 0.3, "embedding_anchor_weight": 0.2}
    objective = KINDS[kind] | {"levels": 2} | anchors | sections.pop("objective", {})
    return configured(objective=objective, **sections)


def sampled(learner: ForwardLearner, mask: np.ndarray = EVERYONE) -> UpdateBatch:
    d = learner.config.diffusion
    sampler = Sampler(learner.backbone, steps=d.steps, eta=d.eta, guidance_scale=d.guidance_scale)
    keep = learner.kept_latents(learner.config, learner.process, 0, 0, len(PROMPTS))
    trajectory = sampler.sample(PROMPTS, SEEDS, learner.version, keep)[0]
    return UpdateBatch(trajectory, np.where(mask, ADVANTAGES, 0.0), mask)


FREE = {"anchor_weight": 0.0, "embedding_anchor_weight": 0.0}
