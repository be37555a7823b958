"""The configuration: typed, closed, and checked before anything starts.

Every field declares whether it affects the result. `free` fields only control where and how things
run, and may change when a run is resumed; `recorded` ones may change too, and the change is stored
with the run. All others are fixed. No torch, no Ray; may import only errors, paths, files and
randomness.
"""

from __future__ import annotations

from texforce_ray.config.actors import LearnerConfig, PlacementConfig, RayConfig, RolloutConfig
from texforce_ray.config.fields import DType
from texforce_ray.config.learning import (
    AwmObjective,
    CustomObjective,
    DirectObjective,
    NftObjective,
    OptimizerConfig,
    PpoObjective,
    RaftObjective,
    RwrObjective,
    UpdateConfig,
)
from texforce_ray.config.model import (
    AdapterConfig,
    DiffusionConfig,
    LoraConfig,
    ModelConfig,
)
from texforce_ray.config.prompts import PromptsConfig, PromptSource
from texforce_ray.config.records import EvalConfig, MlflowConfig, TrackConfig, WandbConfig
from texforce_ray.config.rewards import AdvantageConfig, RewardConfig
from texforce_ray.config.schema import Config, recorded_paths

__all__ = [
    "AdapterConfig", "AdvantageConfig", "AwmObjective", "Config", "CustomObjective", "DType",
    "DiffusionConfig", "DirectObjective", "EvalConfig", "LearnerConfig", "LoraConfig",
    "MlflowConfig", "ModelConfig", "NftObjective", "OptimizerConfig", "PlacementConfig",
    "PpoObjective", "PromptSource", "PromptsConfig", "RaftObjective", "RayConfig", "RewardConfig",
    "RolloutConfig", "RwrObjective", "TrackConfig", "UpdateConfig", "WandbConfig", "recorded_paths",
]  # fmt: skip
