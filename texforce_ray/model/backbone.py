"""The frozen pipeline behind one small interface: tokenize, encode, predict, decode."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from texforce_ray.artifacts.families import Family, own_family, wrong_process
from texforce_ray.artifacts.location import locate_model
from texforce_ray.config import Config
from texforce_ray.diffusion.process import Process
from texforce_ray.errors import ConfigError
from texforce_ray.model.compiling import compile_regions, outermost
from texforce_ray.model.conditioning import PLAIN, Conditioning, Drawing, Prepared, Tokens
from texforce_ray.model.drawing import check_drawing
from texforce_ray.model.frozen import load_denoiser, merge_adapter
from texforce_ray.model.loading import load_pipeline
from texforce_ray.model.padding import padded

_VAE_BLOCKS = ("ResnetBlock2D", "Attention", "GroupNorm")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Backbone(ABC):
    """A frozen pipeline: text encoders, a denoiser, a VAE, and a denoising process.

    What a family defines is abstract here; `model.stable_diffusion` has the first two families.
    """

    def __init__(
        self, pipe: Any, family: Family, device: torch.device, drawing: Drawing = PLAIN
    ) -> None:
        self.family, self.device, self.drawing = family, device, drawing
        self.compiled = False
        self._noise_dtype: torch.dtype | None = None
        self.pipe = pipe
        for name in family.models:
            if not (drawing.park_encoders and name in family.encoders):
                getattr(pipe, name).to(device)
        self.denoiser: Any = getattr(pipe, family.denoiser).eval().requires_grad_(False)
        self.vae: AutoencoderKL = pipe.vae.eval().requires_grad_(False)
        encoders = [getattr(pipe, name) for name in family.encoders]
        self.text_encoders = [encoder.eval().requires_grad_(False) for encoder in encoders]
        self._tokenizers = [getattr(pipe, name) for name in family.tokenizers]
        self.denoiser.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        check_drawing(self)

    def compile(self, **options: Any) -> None:
        """torch.compile denoiser and VAE decoder by their blocks, with torch's options; once.

        Raises:
            ConfigError: this machine has no compiler, or the denoiser none of the named blocks.
        """
        if self.compiled:
            return
        compile_regions(self.denoiser, self.blocks, **options)
        if any(True for _ in outermost(self.vae, _VAE_BLOCKS)):  # another kind of VAE stays eager
            compile_regions(self.vae.decoder, _VAE_BLOCKS, **options)
        self.compiled = True

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run uncompiled within: for batches of a size that would be compiled for them alone."""
        if not self.compiled:
            yield
            return
        self.compiled = False
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.compiled = True

    @property
    def text_encoder(self) -> Any:
        """The first text encoder."""
        return self.text_encoders[0]

    def parts(self) -> dict[str, nn.Module]:
        """The parts that can have an adapter, by the pipeline's names."""
        encoders = dict(zip(self.family.encoders, self.text_encoders, strict=True))
        return {**encoders, self.family.denoiser: self.denoiser}

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def noise_dtype(self) -> torch.dtype:
        """The dtype in which noise is drawn: in another one, the noise would differ."""
        return self._noise_dtype or self.dtype

    @contextmanager
    def same_noise(self) -> Iterator[None]:
        """Keep drawing the same noise while the networks' dtype changes."""
        self._noise_dtype = self.dtype
        try:
            yield
        finally:
            self._noise_dtype = None

    # ---- what a family defines -------------------------------------------------------------

    @abstractmethod
    def process(self, steps: int, eta: float, kernel: str = "cps") -> Process:
        """The denoising process of this model; `kernel` is for flows."""

    @abstractmethod
    def _encode(self, ids: Sequence[Tensor], clip_skip: int | None) -> Conditioning:
        """From ids of `tokenize` to embeddings, with gradient."""

    @abstractmethod
    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output for x [B, C, h, w] at timesteps [B], each row with its prompt."""

    @abstractmethod
    def prepare(self, conditioning: Conditioning) -> Prepared:
        """What the denoiser computes from P distinct prompts alone, with gradient."""

    @abstractmethod
    def predict_prepared(
        self, x: Tensor, timesteps: Tensor, prepared: Prepared, rows: np.ndarray
    ) -> Tensor:
        """`predict`, where row b has prompt `rows[b]` (int64 [B]) of the prepared ones."""

    # ---- what a family may define -----------------------------------------------------------

    # Drawing options without effect on its pipelines.
    ignored: tuple[str, ...] = ()
    # Whether text encoders that are not trained can be parked.
    parks: bool = False
    # Classes of the denoiser's blocks, each of which is compiled once; none: it is one block.
    blocks: tuple[str, ...] = ()
    # The largest `max_sequence_length` that the stock pipeline takes.
    longest: float = float("inf")

    @property
    def latent_multiple(self) -> int:
        """Number of latents that each side of an image must be a multiple of."""
        return 1

    def passes(self, scale: float) -> int:
        """Passes through the denoiser at each step, with guidance of this scale."""
        return 2 if scale > 1 else 1

    def unguided(self, scale: float) -> float:
        """The scale at which the denoiser is trained on the forward process: without guidance."""
        del scale
        return 1.0

    def with_guidance(self, conditioning: Conditioning, scale: float) -> Conditioning:
        """Conditioning for a guidance scale, if the denoiser reads it."""
        del scale
        return conditioning

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """The guided output."""
        return guide(unconditional, conditional, scale)

    def texts(self, prompts: Sequence[str], tokenizer: Any) -> list[str]:
        """What a tokenizer is given of some prompts."""
        # A textual inversion with several vectors is one word of the prompt.
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return list(prompts) if convert is None else convert(list(prompts), tokenizer)

    # ---- what all share --------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        size = self.denoiser.config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return self.denoiser.config.in_channels, *self._latent_sides(height, width)

    def _latent_sides(self, height: int, width: int) -> tuple[int, int]:
        """Of the configured image, or else these."""
        d, scale = self.drawing, self.pipe.vae_scale_factor
        height = height if d.height is None else d.height // scale
        width = width if d.width is None else d.width // scale
        return height, width

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Padded ids of each prompt for each encoder, truncated at its limit."""
        ids, truncated = [], [False] * len(prompts)
        named = zip(self.family.encoders, self._tokenizers, self.text_encoders, strict=True)
        for name, tokenizer, encoder in named:
            texts = self.texts(prompts, tokenizer)
            if name in self.family.lengths:
                limit = self.drawing.max_sequence_length or self.family.lengths[name]
            else:
                # Some tokenizers give no limit; transformers then takes it to be 1e30.
                limit = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            ids.append(
                tokenizer(
                    texts,
                    padding="max_length",
                    max_length=limit,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids
            )
            full = tokenizer(texts, truncation=False, verbose=False).input_ids
            truncated = [t or len(row) > limit for t, row in zip(truncated, full, strict=True)]
        return Tokens(tuple(ids), truncated)

    def encode(self, ids: Sequence[Tensor]) -> Conditioning:
        """The policy's forward pass: from ids of `tokenize` to embeddings, with gradient."""
        return self._encode(ids, self.drawing.clip_skip)

    def encode_empty(self) -> Conditioning:
        """The prompt that guidance steers away from, through the same trainable encoder.

        The negative prompt, or the empty one. As in stock pipelines, no layer is skipped for it.
        """
        return self._encode(self.tokenize([self.drawing.negative_prompt or ""]).ids, None)

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images in [0, 1], [B, 3, H, W], with gradient."""
        count = len(latents)
        if self.compiled:
            latents = torch.cat([latents, latents[-1:].expand(padded(count) - count, -1, -1, -1)])
        scaled = self._unscaled(latents.to(self.vae.dtype))
        return (self.vae.decode(scaled).sample[:count] / 2 + 0.5).clamp(0, 1)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents in the VAE's own scale."""
        return latents / self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images, uint8 [B, H, W, 3], on the device."""
        pixels = self.decode_pixels(latents).mul(255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous()


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, in diffusers' parametrisation)."""
    return unconditional + scale * (conditional - unconditional)


def load_backbone(
    path: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    denoiser: str | None = None,
    denoiser_adapters: Sequence[str] = (),
    single_file_config: str | None = None,
    drawing: Drawing = PLAIN,
    family: Family | None = None,
    left_out: Sequence[str] = (),
) -> Backbone:
    """Load a diffusers pipeline directory, hub id or single file; 'embedded' is the shapes world.

    `denoiser` replaces the pipeline's by another; `denoiser_adapters` are merged into it. `family`:
    the user's own, if any. `left_out`: optional text encoders that are not loaded.

    Raises:
        ConfigError: the pipeline is missing, unsupported or incomplete, or an adapter is for
            another U-Net.
    """
    pipe, found = load_pipeline(
        locate_model(path, variant, single_file_config, family, left_out),
        path,
        DTYPES[dtype],
        revision=revision,
        variant=variant,
        single_file_config=single_file_config,
        own=family,
        left_out=left_out,
    )
    pipe.set_progress_bar_config(disable=True)
    if denoiser is not None:
        replaced = getattr(pipe, found.denoiser)
        setattr(pipe, found.denoiser, load_denoiser(denoiser, DTYPES[dtype], replaced, found))
    for adapter in denoiser_adapters:
        merge_adapter(pipe, adapter, found)
    module, _, name = found.backbone.partition(":")
    kind: type[Backbone] = getattr(importlib.import_module(module), name)
    return kind(pipe, found, torch.device(device), drawing)


def load_config_backbone(config: Config, num_gpus: float) -> Backbone:
    """The configured backbone on the device that this process was given."""
    model, d = config.model, config.diffusion
    device = model.device
    if device == "auto":
        device = "cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and model.dtype == "float32":
        # TF32's ten bits would make sampler and learner disagree by more than PPO's clip range.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    backbone = load_backbone(
        model.path,
        dtype=model.dtype,
        device=device,
        revision=model.revision,
        variant=model.variant,
        denoiser=model.denoiser,
        denoiser_adapters=model.denoiser_adapters,
        single_file_config=model.single_file_config,
        drawing=Drawing(
            d.height,
            d.width,
            d.clip_skip,
            d.negative_prompt,
            d.max_sequence_length,
            model.park_encoders,
            model.cached_prompts,
        ),
        family=own_family(model.family),
        left_out=model.leave_out,
    )
    if backbone.family.process not in (None, d.process):
        raise wrong_process(backbone.family, model.path, d.process)
    # A scale that the model does not take is refused now, not at the end of a run.
    passes = [backbone.passes(scale) for scale in config.guidance_scales]
    if d.negative_prompt and max(passes) == 1:
        raise ConfigError(
            "diffusion.negative_prompt: has no effect without guidance; leave it null"
        )
    if model.compile:
        backbone.compile()
    return backbone
