"""The frozen pipeline behind one small interface: tokenize, encode, predict, decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from texforce_ray.config import Config
from texforce_ray.errors import ConfigError
from texforce_ray.model import attention
from texforce_ray.model.conditioning import PLAIN, Conditioning, Drawing, Prepared, Tokens
from texforce_ray.model.frozen import load_unet, merge_unet_adapter
from texforce_ray.model.loading import load_pipeline
from texforce_ray.model.location import locate_model
from texforce_ray.model.snapshot import TEXT_ENCODERS, UNET

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Backbone:
    """Stable Diffusion 1.x, 2.x and SD-Turbo: one CLIP text encoder, a U-Net, a VAE, noise."""

    def __init__(self, pipe: Any, device: torch.device, drawing: Drawing = PLAIN) -> None:
        self.device, self.drawing = device, drawing
        self.compiled = False
        self._noise_dtype: torch.dtype | None = None
        self.pipe = pipe.to(device)
        self.unet: UNet2DConditionModel = pipe.unet.eval().requires_grad_(False)
        self.vae: AutoencoderKL = pipe.vae.eval().requires_grad_(False)
        self.text_encoders = [encoder.eval().requires_grad_(False) for encoder in self._encoders()]
        self._cross_attention = attention.install(self.unet)
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        # Any scheduler that the directory names is replaced by DDIM with the same noise schedule;
        # clipping x_0 would make the closed-form likelihood wrong.
        self.scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, clip_sample=False, thresholding=False
        )
        self.init_noise_sigma = float(self.scheduler.init_noise_sigma)
        self._check_drawing()

    def _check_drawing(self) -> None:
        d, scale = self.drawing, self.pipe.vae_scale_factor
        for name in ("height", "width"):
            if (value := getattr(d, name)) is not None and value % scale:
                raise ConfigError(
                    f"diffusion.{name}: {value} is no multiple of {scale}, the size of a latent"
                )
        layers = min(encoder.config.num_hidden_layers for encoder in self.text_encoders)
        most = layers - 1 - (len(self.text_encoders) > 1)  # SDXL skips one anyway
        if d.clip_skip is not None and d.clip_skip > most:
            raise ConfigError(
                f"diffusion.clip_skip: {d.clip_skip} leaves no layer of a text encoder of "
                f"{layers}; at most {most}"
            )

    def compile(self) -> None:
        """torch.compile the U-Net; every shape it then sees follows from the batch size alone."""
        # With and without gradient, with and without adapter, a few batch sizes: past the limit
        # (8) torch would go on uncompiled without a word.
        # Named so in torch 2.6, our lowest; later versions keep it as an alias of recompile_limit.
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
        self.unet.compile(dynamic=False)
        self.compiled = True

    def _encoders(self) -> list[Any]:
        return [self.pipe.text_encoder]

    def _tokenizers(self) -> list[Any]:
        return [self.pipe.tokenizer]

    @property
    def text_encoder(self) -> Any:
        """The first text encoder."""
        return self.text_encoders[0]

    def parts(self) -> dict[str, nn.Module]:
        """What an adapter can be on, by the pipeline's names."""
        encoders = dict(zip(TEXT_ENCODERS, self.text_encoders, strict=False))
        return {**encoders, UNET: self.unet}

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def noise_dtype(self) -> torch.dtype:
        """The dtype in which noise is drawn: another one would be other noise."""
        return self._noise_dtype or self.dtype

    @contextmanager
    def same_noise(self) -> Iterator[None]:
        """Within it, noise stays what it is now, whatever the networks' dtype becomes."""
        self._noise_dtype = self.dtype
        try:
            yield
        finally:
            self._noise_dtype = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        size = self.unet.config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        d, scale = self.drawing, self.pipe.vae_scale_factor
        height = height if d.height is None else d.height // scale
        width = width if d.width is None else d.width // scale
        return self.unet.config.in_channels, height, width

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Padded ids of each prompt for each encoder; longer ones are cut at its limit."""
        ids, truncated = [], [False] * len(prompts)
        for tokenizer, encoder in zip(self._tokenizers(), self.text_encoders, strict=True):
            # A textual inversion of several vectors stands in the prompt as one word.
            texts = self.pipe.maybe_convert_prompt(list(prompts), tokenizer)
            # Some tokenizers say nothing of their limit, which transformers takes for 1e30.
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
        """The policy's forward pass: ids as from `tokenize` to embeddings, with gradient."""
        return self._encode(ids, self.drawing.clip_skip)

    def encode_empty(self) -> Conditioning:
        """What guidance leads away from, through the same trainable encoder.

        The negative prompt, or the empty one. As in stock pipelines, no layer is skipped for it.
        """
        return self._encode(self.tokenize([self.drawing.negative_prompt or ""]).ids, None)

    def _encode(self, ids: Sequence[Tensor], clip_skip: int | None) -> Conditioning:
        encoder, tokens = self.text_encoder, ids[0].to(self.device)
        if clip_skip is None:
            hidden = encoder(tokens, attention_mask=None)[0]
        else:
            layers = encoder(tokens, attention_mask=None, output_hidden_states=True).hidden_states
            # transformers 5.6 moved the layers of `text_model` into the model itself.
            norm = getattr(encoder, "text_model", encoder).final_layer_norm
            hidden = norm(layers[-(clip_skip + 1)])
        return Conditioning(hidden.to(self.dtype))

    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's output for x [B, C, h, w] at timesteps [B], each row with its prompt."""
        return self.unet(
            x.to(self.dtype),
            timesteps,
            encoder_hidden_states=conditioning.hidden,
            added_cond_kwargs=self._added(conditioning.pooled, conditioning.time_ids),
        ).sample

    def prepare(self, conditioning: Conditioning) -> Prepared:
        """What the U-Net makes of P distinct prompts before it sees a latent, with gradient."""
        found = attention.keys_values(self._cross_attention, conditioning.hidden)
        return Prepared(found, conditioning.pooled, conditioning.time_ids)

    def predict_prepared(
        self, x: Tensor, timesteps: Tensor, prepared: Prepared, rows: np.ndarray
    ) -> Tensor:
        """`predict`, where row b has prompt `rows[b]` (int64 [B]) of the prepared ones."""
        pooled, time_ids, shared = prepared.pooled, prepared.time_ids, prepared.keys_values
        folded, count = attention.group_rows(rows), len(rows)
        if self.compiled:
            more = padded(count) - count  # masks leave last batches of any size
            x = torch.cat([x, x[-1:].expand(more, *x.shape[1:])])
            timesteps = torch.cat([timesteps, timesteps[-1:].expand(more)])
            rows = np.concatenate([rows, np.repeat(rows[-1:], more)])
            # How many prompts there are, and how they lie, changes from batch to batch: chosen
            # here, all shapes within follow from the batch size, and nothing compiles again.
            chosen = torch.from_numpy(rows).to(self.device)
            shared = tuple(t.index_select(0, chosen).to(self.dtype) for t in shared)
            folded = np.arange(len(rows))
        groups = torch.from_numpy(folded).to(self.device)
        if pooled is not None and time_ids is not None:
            index = torch.from_numpy(rows).to(self.device)
            # Cast after the choice, as keys and values: see `attention`.
            pooled = pooled.index_select(0, index).to(self.dtype)
            time_ids = time_ids.index_select(0, index).to(self.dtype)
        return self.unet(
            x.to(self.dtype),
            timesteps,
            encoder_hidden_states=shared[0],  # says only that there are prompts
            cross_attention_kwargs={"keys_values": shared, "groups": groups},
            added_cond_kwargs=self._added(pooled, time_ids),
        ).sample[:count]

    def _added(self, pooled: Tensor | None, time_ids: Tensor | None) -> dict[str, Tensor] | None:
        """What the U-Net is told beside the prompt's tokens."""
        del pooled, time_ids
        return None

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images in [0, 1], [B, 3, H, W], with gradient."""
        scaled = self._unscaled(latents.to(self.vae.dtype))
        return (self.vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the VAE means them."""
        return latents / self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [B, C, h, w] to images, uint8 [B, H, W, 3]."""
        pixels = self.decode_pixels(latents).mul(255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()


class XlBackbone(Backbone):
    """SDXL and SDXL-Turbo: two text encoders, a pooled embedding, the image's size."""

    def __init__(self, pipe: Any, device: torch.device, drawing: Drawing = PLAIN) -> None:
        super().__init__(pipe, device, drawing)
        if self.vae.config.force_upcast:  # in half precision its decoder overflows: black images
            self.vae.float()
        _, height, width = self.latent_shape
        size = (height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)
        # Original size, crop, target size: an uncropped image of the pipeline's own size.
        self._time_ids = torch.tensor([*size, 0, 0, *size], device=device, dtype=self.dtype)

    def _encoders(self) -> list[Any]:
        return [self.pipe.text_encoder, self.pipe.text_encoder_2]

    def _tokenizers(self) -> list[Any]:
        return [self.pipe.tokenizer, self.pipe.tokenizer_2]

    def _encode(self, ids: Sequence[Tensor], clip_skip: int | None) -> Conditioning:
        hidden, pooled = [], None
        for encoder, part in zip(self.text_encoders, ids, strict=True):
            output = encoder(part.to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-((clip_skip or 0) + 2)].to(self.dtype))
            pooled = output[0]
        assert pooled is not None  # the second encoder's projection
        time_ids = self._time_ids.expand(len(ids[0]), -1)
        return Conditioning(torch.cat(hidden, dim=-1), pooled.to(self.dtype), time_ids)

    def encode_empty(self) -> Conditioning:
        empty = super().encode_empty()
        given = self.drawing.negative_prompt is not None
        if given or not self.pipe.config.force_zeros_for_empty_prompt:
            return empty
        assert empty.pooled is not None
        return Conditioning(
            torch.zeros_like(empty.hidden), torch.zeros_like(empty.pooled), empty.time_ids
        )

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, std = (getattr(self.vae.config, f"latents_{key}", None) for key in ("mean", "std"))
        if mean is None or std is None:
            return super()._unscaled(latents)
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return latents * std / self.vae.config.scaling_factor + mean

    def _added(self, pooled: Tensor | None, time_ids: Tensor | None) -> dict[str, Tensor] | None:
        assert pooled is not None
        assert time_ids is not None
        return {"text_embeds": pooled, "time_ids": time_ids}


def padded(count: int) -> int:
    """A batch size that compiled networks see: at most a quarter more, four to each octave."""
    step = max(1, 2 ** (count.bit_length() - 3))
    return -(-count // step) * step


def load_backbone(
    path: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    unet: str | None = None,
    unet_adapters: Sequence[str] = (),
    single_file_config: str | None = None,
    drawing: Drawing = PLAIN,
) -> Backbone:
    """Load a diffusers pipeline directory, hub id or single file; 'embedded' is the shapes world.

    `unet` replaces the pipeline's U-Net by another; `unet_adapters` are merged into it.

    Raises:
        ConfigError: nothing there, not a pipeline of a supported kind, or one that is incomplete;
            an adapter of another U-Net.
    """
    pipe = load_pipeline(
        locate_model(path, variant, single_file_config),
        path,
        DTYPES[dtype],
        revision=revision,
        variant=variant,
        single_file_config=single_file_config,
    )
    pipe.set_progress_bar_config(disable=True)
    if unet is not None:
        pipe.unet = load_unet(unet, DTYPES[dtype], pipe.unet)
    for adapter in unet_adapters:
        merge_unet_adapter(pipe, adapter)
    family = XlBackbone if isinstance(pipe, StableDiffusionXLPipeline) else Backbone
    return family(pipe, torch.device(device), drawing)


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
        unet=model.unet,
        unet_adapters=model.unet_adapters,
        single_file_config=model.single_file_config,
        drawing=Drawing(d.height, d.width, d.clip_skip, d.negative_prompt),
    )
    if model.compile:
        backbone.compile()
    return backbone
