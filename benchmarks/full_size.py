"""Published architectures at random weights, and miniatures to try scripts with.

Speed does not depend on the weights' values. Nothing is downloaded. Stable Diffusion 3.5 medium is
without T5, as it can be used: its transformer reads as many tokens, and does as much work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from texforce_ray.model.published import PUBLISHED
from texforce_ray.shapes.captions import vocabulary
from texforce_ray.shapes.tokenizer import build_tokenizer

_SD35 = PUBLISHED["sd3.5-medium"].parts
_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "projection_dim": 32}  # fmt: skip
_TINY_FLOW = {
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
    "transformer": {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 96,
                    "pooled_projection_dim": 64, "caption_projection_dim": 128,
                    "pos_embed_max_size": 64, "dual_attention_layers": (0,), "sample_size": 8},
    "vae": {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8},
}  # fmt: skip


def make_pipeline(folder: Path, size: str) -> None:
    """Save a pipeline to `folder`: 'sd15' in float16, 'sd35' in bfloat16, or a miniature of one."""
    if size in ("sd35", "tiny-flow"):
        _make_flow(folder, full=size == "sd35")
    else:
        _make_ddim(folder, full=size == "sd15")


def _make_flow(folder: Path, *, full: bool) -> None:
    torch.manual_seed(0)
    parts: dict[str, dict[str, Any]] = {name: dict(values) for name, values in _SD35.items()}
    if not full:
        for name, smaller in _TINY_FLOW.items():
            parts[name] |= smaller
    dtype = torch.bfloat16 if full else torch.float32
    tokenizer = build_tokenizer(vocabulary())
    tokenizer.model_max_length = 77
    clips = {}
    with _where(full=full):
        for name in ("text_encoder", "text_encoder_2"):
            clips[name] = CLIPTextModelWithProjection(CLIPTextConfig(**parts[name])).to(dtype)
        transformer = SD3Transformer2DModel(**parts["transformer"]).to(dtype)
        vae = AutoencoderKL(**parts["vae"]).to(dtype)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **clips,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)


def _where(*, full: bool) -> torch.device:
    """Where weights are drawn: a GPU fills large networks in seconds."""
    return torch.device("cuda" if full and torch.cuda.is_available() else "cpu")


def _make_ddim(folder: Path, *, full: bool) -> None:
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
    with _where(full=full):
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
        encoder = CLIPTextModel(text)
    tokenizer = build_tokenizer(vocabulary())
    tokenizer.model_max_length = text.max_position_embeddings  # 77, as CLIP's
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
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
