"""The model families that can be trained: one row each. No torch.

A family is known by the class that its `model_index.json` names. To add one, add a row here and a
subclass of `Backbone`: docs/extending.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from texforce_ray.errors import ConfigError

# Schedulers with a DDPM's noise schedule: our DDIM on their betas draws as stock DDIM does.
DDPM_SCHEDULERS = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler", "SASolverScheduler", "IPNDMScheduler", "LCMScheduler",
    "TCDScheduler",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How one family's pipelines differ from another's.

    pipeline: diffusers' class. backbone: our 'module:Class', imported when it is used. encoders:
    text encoders by the pipeline's names, with their classes. denoiser: its name in the pipeline;
    denoiser_class: its class. schedulers: supported classes of the pipeline's scheduler. load:
    arguments of the pipeline's `from_pretrained`.
    """

    pipeline: str
    backbone: str
    encoders: Mapping[str, str]
    denoiser: str = "unet"
    denoiser_class: str = "UNet2DConditionModel"
    schedulers: Sequence[str] = DDPM_SCHEDULERS
    load: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokenizers(self) -> list[str]:
        """The encoders' tokenizers, by the pipeline's names."""
        return [name.replace("text_encoder", "tokenizer") for name in self.encoders]

    @property
    def classes(self) -> list[str]:
        """The classes of text encoders and denoiser."""
        return [*self.encoders.values(), self.denoiser_class]

    @property
    def models(self) -> list[str]:
        """All parts with weights, by the pipeline's names."""
        return [*self.encoders, self.denoiser, "vae"]


_ROWS = (
    Family(
        "StableDiffusionPipeline",
        "texforce_ray.model.stable_diffusion:StableDiffusion",
        {"text_encoder": "CLIPTextModel"},
        load={"safety_checker": None, "requires_safety_checker": False},
    ),
    Family(
        "StableDiffusionXLPipeline",
        "texforce_ray.model.stable_diffusion:StableDiffusionXl",
        {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
        load={"add_watermarker": False},
    ),
)
FAMILIES = {family.pipeline: family for family in _ROWS}


def own_family(target: str | None) -> Family | None:
    """The user's own family, 'package.module:FAMILY'; None if there is none.

    Raises:
        ConfigError: it cannot be imported, or is not a `Family`.
    """
    if target is None:
        return None
    module, _, name = target.partition(":")
    try:
        family = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.family: {target!r} cannot be imported: {error}") from error
    if not isinstance(family, Family):
        raise ConfigError(
            f"model.family: {target!r} is not a texforce_ray.artifacts.families.Family"
        )
    return family


def family_of(pipeline: object, path: str, own: Family | None = None) -> Family:
    """The family of a pipeline, by the name of its class; `own` stands before the table's rows.

    Raises:
        ConfigError: the class is not supported; `path` names the pipeline in the error.
    """
    if own is not None:
        if pipeline == own.pipeline:
            return own
        raise ConfigError(
            f"model.family: the family is for {own.pipeline}, but model.path {path} holds a "
            f"{pipeline}"
        )
    if isinstance(pipeline, str) and pipeline in FAMILIES:
        return FAMILIES[pipeline]
    raise ConfigError(f"model.path: {path} holds a {pipeline}; supported: {', '.join(FAMILIES)}")
