"""Models as their config files describe them: published ones by name, local directories. No torch.

Only what decides shapes is given here; all else is the libraries' default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from texforce_ray.artifacts.families import FAMILIES, Family, family_in
from texforce_ray.artifacts.inspection import check_pipeline, read_json
from texforce_ray.artifacts.location import EMBEDDED_MODELS
from texforce_ray.errors import ConfigError

Values = Mapping[str, Any]
_GUIDANCE = 5.0  # diffusion.guidance_scale's default


@dataclass(frozen=True)
class Blueprint:
    """What a pipeline is built from.

    family: which it is. parts: the config of each part, by the pipeline's names. guidance: the
    scale that is assumed if none is given.
    """

    family: Family
    parts: Mapping[str, Values]
    guidance: float = _GUIDANCE


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
    return Blueprint(FAMILIES["FluxPipeline"], parts, _GUIDANCE if guided else 1.0)


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
        check_pipeline(folder, model, weights=False)
        family = family_in(read_json(folder / "model_index.json", model), model)
        parts = {name: read_json(folder / name / "config.json", model) for name in family.models}
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", "--model", 1)) from error
    return Blueprint(family, parts)
