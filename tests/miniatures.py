"""Every backbone family in miniature: real classes, random weights, what the directory says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from texforce_ray.shapes import networks
from texforce_ray.shapes.captions import vocabulary
from texforce_ray.shapes.tokenizer import MAX_LENGTH, build_tokenizer

# name: (SDXL?, prediction type, scheduler, timestep spacing, steps, guidance, zeros for empty)
FAMILIES: dict[str, tuple[bool, str, type, str, int, float, bool]] = {
    "sd15": (False, "epsilon", DDIMScheduler, "leading", 4, 3.0, False),
    "sd21": (False, "v_prediction", DDIMScheduler, "leading", 4, 3.0, False),
    "sd_turbo": (False, "epsilon", EulerDiscreteScheduler, "trailing", 2, 0.0, False),
    "sdxl": (True, "epsilon", EulerDiscreteScheduler, "leading", 4, 3.0, True),
    "sdxl_no_zeros": (True, "epsilon", EulerDiscreteScheduler, "leading", 3, 2.0, False),
    "sdxl_turbo": (True, "epsilon", EulerDiscreteScheduler, "trailing", 2, 0.0, True),
}


def build(path: Path, family: str) -> None:
    """Save the miniature of `family` to `path`."""
    xl, prediction, scheduler, spacing, _, _, zeros = FAMILIES[family]
    torch.manual_seed(0)
    tokenizer = build_tokenizer(vocabulary())
    noise = scheduler.from_config(
        networks.build_scheduler().config, prediction_type=prediction, timestep_spacing=spacing
    )
    shared: dict[str, Any] = {
        "vae": networks.build_vae(),
        "text_encoder": networks.build_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "scheduler": noise,
        "feature_extractor": None,
    }
    if not xl:
        StableDiffusionPipeline(
            **shared, unet=networks.build_unet(), safety_checker=None,
            requires_safety_checker=False,
        ).save_pretrained(path)  # fmt: skip
        return
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=MAX_LENGTH, projection_dim=48,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128), layers_per_block=1, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=96 + 64, attention_head_dim=4, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 48,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        **{key: value for key, value in shared.items() if key != "feature_extractor"},
        text_encoder_2=second, tokenizer_2=tokenizer, unet=unet,
        force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    ).save_pretrained(path)  # fmt: skip
