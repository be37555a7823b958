"""Stable Diffusion 1.5's architecture at random weights, and a miniature to try scripts with.

Speed does not depend on the weights' values. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from texforce_ray.shapes.captions import vocabulary
from texforce_ray.shapes.tokenizer import build_tokenizer


def make_pipeline(folder: Path, size: str) -> None:
    """Save a pipeline of `size` ('sd15' or 'tiny') to `folder`, float16."""
    full = size == "sd15"
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768 if full else 32,
        intermediate_size=3072 if full else 64,
        num_hidden_layers=12 if full else 2,
        num_attention_heads=12 if full else 2,
        projection_dim=768 if full else 32,
        vocab_size=49408,
        hidden_act="quick_gelu",
    )
    channels = (320, 640, 1280, 1280) if full else (32, 64)
    levels = len(channels)
    unet = UNet2DConditionModel(
        sample_size=64 if full else 8,
        cross_attention_dim=text.hidden_size,
        attention_head_dim=8 if full else 2,
        block_out_channels=channels,
        layers_per_block=2 if full else 1,
        norm_num_groups=32 if full else 8,
        down_block_types=(*["CrossAttnDownBlock2D"] * (levels - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (levels - 1)),
    )
    vae_channels = (128, 256, 512, 512) if full else (16, 32)
    vae = AutoencoderKL(
        block_out_channels=vae_channels,
        down_block_types=["DownEncoderBlock2D"] * len(vae_channels),
        up_block_types=["UpDecoderBlock2D"] * len(vae_channels),
        layers_per_block=2 if full else 1,
        norm_num_groups=32 if full else 8,
        latent_channels=4,
        sample_size=512 if full else 16,
        scaling_factor=0.18215,
    )
    tokenizer = build_tokenizer(vocabulary())
    tokenizer.model_max_length = text.max_position_embeddings  # 77, as CLIP's
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16 if full else torch.float32).save_pretrained(folder)
