"""Models without weights: published ones by name and local directories, on torch's meta device.

Of a published model's configs, only what decides shapes is given; all else is the libraries'
default.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from texforce_ray.artifacts.families import FAMILIES, Family
from texforce_ray.artifacts.inspection import check_pipeline, read_json
from texforce_ray.artifacts.location import EMBEDDED_MODELS
from texforce_ray.artifacts.snapshot import LoraShape
from texforce_ray.config.model import (
    AdapterConfig,
    DenoiserAdapterConfig,
    DiffusionConfig,
    T5AdapterConfig,
)
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import DTYPES, Backbone
from texforce_ray.model.conditioning import Drawing
from texforce_ray.model.encoders import TextEncoder

META = torch.device("meta")
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Blueprint:
    """What a pipeline is built from.

    family: which it is. parts: the config of each part, by the pipeline's names.
    """

    family: Family
    parts: Mapping[str, Values]

    @property
    def guidance(self) -> float:
        """The scale that is assumed if none is given: `diffusion.guidance_scale`'s default, or 1.

        Some FLUX transformers take none.
        """
        takes_none = self.parts[self.family.denoiser].get("guidance_embeds") is False
        return 1.0 if takes_none else DiffusionConfig().guidance_scale


_CLIP_L: Values = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768,
    "hidden_act": "quick_gelu",
}  # fmt: skip
_CLIP_G: Values = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "max_position_embeddings": 77, "projection_dim": 1280,
    "hidden_act": "gelu",
}  # fmt: skip
_T5_XXL: Values = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_QWEN3_4B: Values = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
_VAE_4: Values = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_VAE_16: Values = {
    **_VAE_4, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
    "shift_factor": 0.1159, "scaling_factor": 0.3611,
}  # fmt: skip
_SD3: Values = {
    "attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
    "in_channels": 16, "out_channels": 16, "sample_size": 128, "patch_size": 2,
    "qk_norm": "rms_norm",
}  # fmt: skip
_SD3_5_MEDIUM: Values = {
    **_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
}  # fmt: skip
_SD3_5_LARGE: Values = {
    **_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}  # fmt: skip
_FLUX: Values = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip
_Z_IMAGE: Values = {
    "in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30,
    "n_kv_heads": 30, "cap_feat_dim": 2560,
}  # fmt: skip
_UNET_SD1: Values = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # fmt: skip
_UNET_XL: Values = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def _sd3(transformer: Values) -> Blueprint:
    encoders = {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5_XXL}
    parts = {**encoders, "transformer": transformer, "vae": _VAE_16}
    return Blueprint(FAMILIES["StableDiffusion3Pipeline"], parts)


def _flux(*, guided: bool) -> Blueprint:
    transformer = {**_FLUX, "guidance_embeds": guided}
    encoders = {"text_encoder": _CLIP_L, "text_encoder_2": _T5_XXL}
    parts = {**encoders, "transformer": transformer, "vae": _VAE_16}
    return Blueprint(FAMILIES["FluxPipeline"], parts)


PUBLISHED: Mapping[str, Blueprint] = {
    "sd1.5": Blueprint(
        FAMILIES["StableDiffusionPipeline"],
        {"text_encoder": _CLIP_L, "unet": _UNET_SD1, "vae": _VAE_4},
    ),
    "sdxl": Blueprint(
        FAMILIES["StableDiffusionXLPipeline"],
        {
            "text_encoder": _CLIP_L,
            "text_encoder_2": _CLIP_G,
            "unet": _UNET_XL,
            "vae": {**_VAE_4, "force_upcast": True},
        },
    ),
    "sd3.5-medium": _sd3(_SD3_5_MEDIUM),
    "sd3.5-large": _sd3(_SD3_5_LARGE),
    "flux.1-dev": _flux(guided=True),
    "flux.1-schnell": _flux(guided=False),
    "z-image": Blueprint(
        FAMILIES["ZImagePipeline"],
        {"text_encoder": _QWEN3_4B, "transformer": _Z_IMAGE, "vae": _VAE_16},
    ),
}


def blueprint_of(model: str) -> Blueprint:
    """A published model by its name, or that of a local diffusers directory, from its configs.

    Raises:
        ConfigError: it is neither; or the directory's pipeline is not supported.
    """
    if model in PUBLISHED:
        return PUBLISHED[model]
    folder = EMBEDDED_MODELS.get(model) or Path(model).expanduser()
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"--model: {model!r} is neither a local diffusers directory nor one of "
            f"{', '.join(PUBLISHED)} (nothing is downloaded)"
        )
    try:
        family = check_pipeline(folder, model, weights=False)
        parts = {name: read_json(folder / name / "config.json", model) for name in family.models}
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", "--model", 1)) from error
    return Blueprint(family, parts)


class _Alone(TextEncoder):
    """A text encoder that encodes each prompt alone while it is not trained, as with a cache."""

    def __call__(self, ids: Tensor) -> Sequence[Tensor]:
        if self.trained:
            return super().__call__(ids)
        return [torch.cat([output] * len(ids)) for output in self._run(ids[:1])]


def build(blueprint: Blueprint, dtype: str, drawing: Drawing) -> Backbone:
    """The backbone on the meta device.

    Raises:
        ConfigError: it cannot draw as `drawing` says.
    """
    family = blueprint.family
    parts = {
        name: _part(_class_of(family, name, values), values, DTYPES[dtype])
        for name, values in blueprint.parts.items()
    }
    pipe = SimpleNamespace(
        **parts,
        **dict.fromkeys(family.tokenizers, SimpleNamespace(pad_token_id=0)),
        scheduler=SimpleNamespace(config={}),
        vae_scale_factor=2 ** (len(parts["vae"].config.block_out_channels) - 1),
        default_sample_size=128,  # FLUX's, whose transformer does not name one
    )
    module, _, name = family.backbone.partition(":")
    backbone: Any = getattr(importlib.import_module(module), name)(pipe, family, META, drawing)
    if hasattr(backbone, "encoders"):
        backbone.encoders = [
            _Alone(e.module, e.encode, META, parked=False, capacity=0) for e in backbone.encoders
        ]
    return backbone


def _class_of(family: Family, name: str, values: Values) -> Any:
    if name in family.encoders:
        return getattr(transformers, family.encoders[name])
    default = family.denoiser_class if name == family.denoiser else "AutoencoderKL"
    return getattr(diffusers, values.get("_class_name", default))


def _part(kind: Any, values: Values, dtype: torch.dtype) -> Any:
    """A part with the dtypes that `from_pretrained` gives it: T5 keeps some float32 in float16."""
    with META:
        if hasattr(kind, "config_class"):
            module = kind(kind.config_class.from_dict(dict(values)))
        else:
            module = kind.from_config(dict(values))
    kept = set(module._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return module


def adapter_shapes(family: Family, train: Sequence[str], rank: int | None) -> dict[str, LoraShape]:
    """The adapters by the pipeline's part names; see `memory.Workload` for the arguments.

    Raises:
        ConfigError: the model lacks a part.
    """
    clips = [name for name, kind in family.encoders.items() if kind.startswith("CLIP")]
    named = train or clips or list(family.encoders)[:1]
    if missing := [name for name in named if name not in (*family.encoders, "denoiser")]:
        raise ConfigError(
            f"--train: a {family.pipeline} has no {missing[0]!r}; it has "
            f"{', '.join(family.encoders)}, denoiser"
        )
    shapes = {}
    for name in dict.fromkeys(named):
        config: AdapterConfig = AdapterConfig()
        if name == "denoiser":
            config = DenoiserAdapterConfig()
        elif family.encoders[name].startswith("T5"):
            config = T5AdapterConfig()
        part = family.denoiser if name == "denoiser" else name
        shapes[part] = LoraShape(rank or config.rank, config.alpha, config.target_modules)
    return shapes
