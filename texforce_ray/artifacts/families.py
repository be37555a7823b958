"""The model families that can be trained: one row each. No torch.

A family is known by the class that its `model_index.json` names. To add one, add a row here and a
subclass of `Backbone`: docs/extending.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    denoiser_class: its class. process: the `diffusion.process` that it takes; None: one of its own.
    schedulers: supported classes of the pipeline's scheduler. optional: encoders that may be left
    out. packed: the denoiser's input channels for each latent channel. lengths: encoders whose
    number of tokens is an argument, and its default. vae_keys: what the stock pipeline does to
    latents besides scaling. load: arguments of the pipeline's `from_pretrained`.
    """

    pipeline: str
    backbone: str
    encoders: Mapping[str, str]
    denoiser: str = "unet"
    denoiser_class: str = "UNet2DConditionModel"
    process: str | None = None
    schedulers: Sequence[str] = DDPM_SCHEDULERS
    optional: Sequence[str] = ()
    packed: int = 1
    lengths: Mapping[str, int] = field(default_factory=dict)
    vae_keys: Sequence[str] = ()
    load: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokenizers(self) -> list[str]:
        """The encoders' tokenizers, by the pipeline's names."""
        return [tokenizer_of(name) for name in self.encoders]

    def without(self, left_out: Sequence[str]) -> Family:
        """The family of pipelines that lack some of the optional encoders."""
        kept = {name: kind for name, kind in self.encoders.items() if name not in left_out}
        nothing = {part: None for name in left_out for part in (name, tokenizer_of(name))}
        return replace(self, encoders=kept, load={**self.load, **nothing})

    @property
    def classes(self) -> list[str]:
        """The classes of text encoders and denoiser."""
        return [*self.encoders.values(), self.denoiser_class]

    @property
    def models(self) -> list[str]:
        """All parts with weights, by the pipeline's names."""
        return [*self.encoders, self.denoiser, "vae"]


def tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _flow(pipeline: str, backbone: str, encoders: Mapping[str, str], **others: Any) -> Family:
    """A family of flow-matching transformers."""
    return Family(
        pipeline,
        f"texforce_ray.model.flow_models:{backbone}",
        encoders,
        denoiser="transformer",
        process="flow",
        schedulers=("FlowMatchEulerDiscreteScheduler",),
        vae_keys=("shift_factor",),
        **others,
    )


_ROWS = (
    Family(
        "StableDiffusionPipeline",
        "texforce_ray.model.stable_diffusion:StableDiffusion",
        {"text_encoder": "CLIPTextModel"},
        process="ddim",
        load={"safety_checker": None, "requires_safety_checker": False},
    ),
    Family(
        "StableDiffusionXLPipeline",
        "texforce_ray.model.stable_diffusion:StableDiffusionXl",
        {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
        process="ddim",
        vae_keys=("latents_mean", "latents_std"),
        load={"add_watermarker": False},
    ),
    _flow(
        "StableDiffusion3Pipeline",
        "StableDiffusion3",
        {
            "text_encoder": "CLIPTextModelWithProjection",
            "text_encoder_2": "CLIPTextModelWithProjection",
            "text_encoder_3": "T5EncoderModel",
        },
        denoiser_class="SD3Transformer2DModel",
        optional=("text_encoder_3",),
        lengths={"text_encoder_3": 256},
    ),
    _flow(
        "FluxPipeline",
        "Flux",
        {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
        denoiser_class="FluxTransformer2DModel",
        packed=4,
        lengths={"text_encoder_2": 512},
    ),
    _flow(
        "ZImagePipeline",
        "ZImage",
        {"text_encoder": "Qwen3Model"},
        denoiser_class="ZImageTransformer2DModel",
        lengths={"text_encoder": 512},
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


def wrong_process(family: Family, path: str, configured: str) -> ConfigError:
    """The error for a model that another `diffusion.process` denoises."""
    return ConfigError(
        f"diffusion.process: {configured!r}, but model.path {path} is a {family.pipeline}, which "
        f"needs {family.process!r}"
    )


def family_in(
    index: Mapping[str, Any], path: str, own: Family | None = None, left_out: Sequence[str] = ()
) -> Family:
    """The family of a pipeline's `model_index.json`, without the optional encoders that it lacks.

    `left_out`: encoders that are not to be loaded.

    Raises:
        ConfigError: it is not supported, or an encoder in `left_out` is not optional.
    """
    family = family_of(index.get("_class_name"), path, own)
    if wrong := [name for name in left_out if name not in family.optional]:
        may = f"; may be left out: {', '.join(family.optional)}" if family.optional else ""
        raise ConfigError(f"model.leave_out: a {family.pipeline} cannot do without {wrong[0]}{may}")
    missing = [name for name in family.optional if not any(index.get(name) or ())]
    return family.without([*missing, *left_out])
