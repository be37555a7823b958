"""The frozen pipeline behind one small interface: tokenize, encode, predict, decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from texforce_ray.config import ModelConfig
from texforce_ray.errors import ConfigError
from texforce_ray.model.location import locate_model

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net is told: hidden [B, L, D]; pooled [B, P] and time_ids [B, 6] for SDXL."""

    hidden: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __getitem__(self, index: Tensor) -> Conditioning:
        return self.map(lambda t: t[index])

    def tensors(self) -> list[Tensor]:
        return [t for f in fields(self) if (t := getattr(self, f.name)) is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same with `function` applied to every tensor there is."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: Any = {k: None if v is None else function(v) for k, v in values.items()}
        return Conditioning(**mapped)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Conditioning)}
        joined: Any = {k: None if c[0] is None else torch.cat(c) for k, c in columns.items()}
        return Conditioning(**joined)


@dataclass(frozen=True)
class Tokens:
    """ids: one int64 [B, L] per text encoder; truncated: bool [B], text beyond the limit."""

    ids: tuple[Tensor, ...]
    truncated: list[bool]


class Backbone:
    """Stable Diffusion 1.x / 2.x: one CLIP text encoder, a U-Net, a VAE, a noise schedule."""

    def __init__(self, pipe: StableDiffusionPipeline, device: torch.device) -> None:
        self.device = device
        self.pipe = pipe.to(device)
        self.tokenizer = pipe.tokenizer
        self.text_encoder = pipe.text_encoder.eval().requires_grad_(False)
        self.unet: UNet2DConditionModel = pipe.unet.eval().requires_grad_(False)
        self.vae: AutoencoderKL = pipe.vae.eval().requires_grad_(False)
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        # Any scheduler that the directory names is replaced by DDIM with the same noise schedule;
        # clipping x_0 would make the closed-form likelihood wrong.
        self.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, clip_sample=False, thresholding=False
        )
        self.init_noise_sigma = float(self.scheduler.init_noise_sigma)

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        size = self.unet.config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return self.unet.config.in_channels, height, width

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Padded ids of each prompt; longer ones are cut at the encoder's limit."""
        tokenizer, texts = self.tokenizer, list(prompts)
        limit = tokenizer.model_max_length
        ids = tokenizer(
            texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
        full = tokenizer(texts, truncation=False, verbose=False).input_ids
        return Tokens((ids,), [len(row) > limit for row in full])

    def encode(self, ids: Sequence[Tensor]) -> Conditioning:
        """The policy's forward pass: ids as from `tokenize` to embeddings, with gradient."""
        hidden = self.text_encoder(ids[0].to(self.device), attention_mask=None)[0]
        return Conditioning(hidden.to(self.dtype))

    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's output for x [B, C, h, w] at timesteps [B]."""
        return self.unet(x, timesteps, encoder_hidden_states=conditioning.hidden).sample

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [B, C, h, w] to images, uint8 [B, H, W, 3]."""
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        pixels = self.vae.decode(scaled).sample
        pixels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()


def load_backbone(
    path: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
) -> Backbone:
    """Load a diffusers pipeline directory or hub id; 'embedded' is the shapes world.

    Raises:
        ConfigError: nothing there, or not a pipeline of a supported kind.
    """
    location = locate_model(path)
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            location,
            dtype=DTYPES[dtype],
            revision=revision,
            variant=variant,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: cannot load {path!r}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return Backbone(pipe, torch.device(device))


def load_config_backbone(model: ModelConfig, num_gpus: float) -> Backbone:
    """The configured backbone on the device that this process was given."""
    device = model.device
    if device == "auto":
        device = "cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu"
    if device == "cuda" and model.dtype == "float32":
        # TF32's ten bits would make sampler and learner disagree by more than PPO's clip range.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return load_backbone(
        model.path,
        dtype=model.dtype,
        device=device,
        revision=model.revision,
        variant=model.variant,
    )
