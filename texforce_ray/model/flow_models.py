"""Flow-matching families: Stable Diffusion 3 and 3.5, FLUX.1, Z-Image.

A transformer reads the prompt's tokens in every block and changes them there, so nothing of it can
be computed once for each prompt: the gradient is cut at the embeddings.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from texforce_ray.artifacts.families import Family
from texforce_ray.diffusion.flow import Flow
from texforce_ray.diffusion.packing import pack, token_positions, unpack
from texforce_ray.diffusion.process import Process
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.conditioning import PLAIN, Conditioning, Drawing, Prepared
from texforce_ray.model.encoders import TextEncoder
from texforce_ray.model.transfer import to_device


class FlowTransformer(Backbone):
    """What these families share; a subclass encodes prompts and calls its transformer."""

    # Of stock `calculate_shift`: the largest shift, if the scheduler names none.
    max_shift = 1.15
    parks = True

    def __init__(
        self, pipe: Any, family: Family, device: torch.device, drawing: Drawing = PLAIN
    ) -> None:
        super().__init__(pipe, family, device, drawing)
        self.encoders = [
            TextEncoder(
                module, self.encoder_output(name), device, parked=drawing.park_encoders,
                capacity=drawing.cached_prompts,
            )
            for name, module in zip(family.encoders, self.text_encoders, strict=True)
        ]  # fmt: skip

    @property
    def latent_multiple(self) -> int:
        return 2  # a token is 2 x 2 latents

    @staticmethod
    def levels(steps: int) -> Any:
        """The noise levels that stock code gives the scheduler, unshifted; None: its own."""
        return np.linspace(1.0, 1 / steps, steps)

    @staticmethod
    def default_side(network: Mapping[str, Any], vae_scale: int) -> int:
        """Side in latents of the stock pipeline's square image, by the transformer's config."""
        del network, vae_scale
        return 128

    def process(self, steps: int, eta: float, kernel: str = "cps") -> Process:
        """The flow on the scheduler's own noise levels, shifted as in the stock pipeline."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        sides = self.latent_shape[1:]
        set_levels(scheduler, steps, sides, self.max_shift, self.levels(steps))
        return Flow.of(scheduler.timesteps, scheduler.sigmas, kernel, eta).to(self.device)

    @abstractmethod
    def encoder_output(self, name: str) -> Any:
        """(encoder, ids [B, L]) -> its outputs that are used, of the encoder of this name."""

    @abstractmethod
    def _velocity(self, x: Tensor, timesteps: Tensor, given: Prepared) -> Tensor:
        """The transformer's output, given one row of conditioning for each latent."""

    def prepare(self, conditioning: Conditioning) -> Prepared:
        """The embeddings themselves."""
        c = conditioning
        return Prepared((c.hidden,), c.pooled, c.time_ids, c.mask, c.guidance)

    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity for x [B, C, h, w] at timesteps [B], each row with its own prompt."""
        return self._velocity(x.to(self.dtype), timesteps, self.prepare(conditioning))

    def predict_prepared(
        self, x: Tensor, timesteps: Tensor, prepared: Prepared, rows: np.ndarray
    ) -> Tensor:
        """`predict`, where row b has prompt `rows[b]` (int64 [B]) of the prepared ones."""
        index = to_device(rows, self.device)
        return self._velocity(x.to(self.dtype), timesteps, prepared.rows(index, self.dtype))

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor


class StableDiffusion3(FlowTransformer):
    """Stable Diffusion 3 and 3.5: two CLIP encoders, T5 or not, guidance."""

    @staticmethod
    def default_side(network: Mapping[str, Any], vae_scale: int) -> int:
        del vae_scale
        return int(network["sample_size"])

    max_shift = 1.16
    blocks = ("JointTransformerBlock",)
    longest = 512

    @staticmethod
    def levels(steps: int) -> Any:
        del steps

    @property
    def latent_multiple(self) -> int:
        return int(self.denoiser.config.patch_size)

    def encoder_output(self, name: str) -> Any:
        if name == "text_encoder_3":
            return _last_hidden
        return partial(_clip_layers, clip_skip=self.drawing.clip_skip or 0)

    def _encode(self, ids: Sequence[Tensor], clip_skip: int | None) -> Conditioning:
        outputs = [encoder(part) for encoder, part in zip(self.encoders, ids, strict=True)]
        layers = [output[1 if clip_skip is None else 2] for output in outputs[:2]]
        pooled = torch.cat([output[0] for output in outputs[:2]], dim=-1)
        hidden = torch.cat(layers, dim=-1).to(self.dtype)
        width = self.denoiser.config.joint_attention_dim
        if len(outputs) == 3:
            long = outputs[2][0].to(self.dtype)
        else:
            length = self.drawing.max_sequence_length or 256  # stock pipelines', without T5 too
            long = hidden.new_zeros(len(hidden), length, width)
        hidden = torch.cat([F.pad(hidden, (0, width - hidden.shape[-1])), long], dim=1)
        return Conditioning(hidden, pooled.to(self.dtype))

    def _velocity(self, x: Tensor, timesteps: Tensor, given: Prepared) -> Tensor:
        return self.denoiser(
            hidden_states=x,
            timestep=timesteps,
            encoder_hidden_states=given.context[0],
            pooled_projections=given.pooled,
        ).sample


class Flux(FlowTransformer):
    """FLUX.1: CLIP's pooled embedding, T5's tokens, packed latents, guidance as an input."""

    ignored = ("clip_skip", "negative_prompt")
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    longest = 512

    def __init__(
        self, pipe: Any, family: Family, device: torch.device, drawing: Drawing = PLAIN
    ) -> None:
        super().__init__(pipe, family, device, drawing)
        _, height, width = self.latent_shape
        self._positions = token_positions(height, width).to(device, self.dtype)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.default_side(self.denoiser.config, self.pipe.vae_scale_factor)
        height, width = self._latent_sides(side, side)
        return self.denoiser.config.in_channels // 4, height, width

    def encoder_output(self, name: str) -> Any:
        return _clip_pooled if name == "text_encoder" else _last_hidden

    def _encode(self, ids: Sequence[Tensor], clip_skip: int | None) -> Conditioning:
        del clip_skip
        (pooled, *_), (hidden, *_) = (e(part) for e, part in zip(self.encoders, ids, strict=True))
        return Conditioning(hidden.to(self.dtype), pooled.to(self.dtype))

    def passes(self, scale: float) -> int:
        if scale > 1 and not self.denoiser.config.guidance_embeds:
            raise ConfigError(
                f"diffusion.guidance_scale: {scale:g}, but this model takes no guidance (its "
                "transformer has guidance_embeds false, as FLUX.1-schnell's); set it to 1"
            )
        return 1

    def with_guidance(self, conditioning: Conditioning, scale: float) -> Conditioning:
        if not self.denoiser.config.guidance_embeds:
            return conditioning
        return conditioning.with_guidance(scale)

    def unguided(self, scale: float) -> float:
        return scale  # it is an input of the network, in training as in sampling

    def _velocity(self, x: Tensor, timesteps: Tensor, given: Prepared) -> Tensor:
        hidden = given.context[0]
        output = self.denoiser(
            hidden_states=pack(x),
            timestep=timesteps.to(self.dtype) / 1000,
            guidance=given.guidance,
            pooled_projections=given.pooled,
            encoder_hidden_states=hidden,
            txt_ids=hidden.new_zeros(hidden.shape[1], 3),
            img_ids=self._positions,
        ).sample
        return unpack(output, *x.shape[2:])


class ZImage(FlowTransformer):
    """Z-Image: a language model's tokens without padding, guidance from 0 instead of 1."""

    ignored = ("clip_skip",)

    @staticmethod
    def default_side(network: Mapping[str, Any], vae_scale: int) -> int:
        del network
        return 1024 // vae_scale

    @property
    def noise_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.default_side(self.denoiser.config, self.pipe.vae_scale_factor)
        height, width = self._latent_sides(side, side)
        return self.denoiser.config.in_channels, height, width

    @staticmethod
    def levels(steps: int) -> Any:
        return torch.linspace(1.0, 1 / steps, steps).tolist()

    def texts(self, prompts: Sequence[str], tokenizer: Any) -> list[str]:
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for prompt in prompts
        ]

    def encoder_output(self, name: str) -> Any:
        del name
        padding = self._tokenizers[0].pad_token_id

        def output(encoder: Any, ids: Tensor) -> Sequence[Tensor]:
            mask = ids != padding
            layers = encoder(
                input_ids=ids, attention_mask=mask, output_hidden_states=True
            ).hidden_states
            return layers[-2], mask

        return output

    def _encode(self, ids: Sequence[Tensor], clip_skip: int | None) -> Conditioning:
        del clip_skip
        hidden, mask = self.encoders[0](ids[0])
        return Conditioning(hidden.to(self.dtype), mask=mask.to(self.dtype))

    def compile(self, **options: Any) -> None:
        del options
        raise ConfigError(
            "model.compile: true, but Z-Image's transformer has other shapes for each length of a "
            "prompt, and would be compiled again and again; leave it false"
        )

    def passes(self, scale: float) -> int:
        return 2 if scale > 0 else 1

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        return conditional + scale * (conditional - unconditional)

    def unguided(self, scale: float) -> float:
        del scale
        return 0.0

    def _velocity(self, x: Tensor, timesteps: Tensor, given: Prepared) -> Tensor:
        assert given.mask is not None
        prompts = [row[keep > 0] for row, keep in zip(given.context[0], given.mask, strict=True)]
        images = list(x.unsqueeze(2).unbind(0))
        output = self.denoiser(images, (1000 - timesteps) / 1000, prompts, return_dict=False)[0]
        return -torch.stack([image.float() for image in output]).squeeze(2)


def set_levels(
    scheduler: FlowMatchEulerDiscreteScheduler,
    steps: int,
    sides: tuple[int, int],
    max_shift: float,
    levels: Any,
) -> None:
    """Set a scheduler's timesteps as its stock pipeline does: shifted by the image's size or not.

    `sides`: height and width in latents. `levels`: what the pipeline passes, if anything.
    """
    height, width = sides
    get = scheduler.config.get
    base, most = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    low, high = get("base_shift", 0.5), get("max_shift", max_shift)
    options: dict[str, Any] = {}
    if get("use_dynamic_shifting"):
        tokens = (height // 2) * (width // 2)
        options["mu"] = low + (high - low) * (tokens - base) / (most - base)
    if levels is not None:
        options["sigmas"] = levels
    scheduler.set_timesteps(steps, **options)


def _last_hidden(encoder: Any, ids: Tensor) -> Sequence[Tensor]:
    return (encoder(ids)[0],)


def _clip_pooled(encoder: Any, ids: Tensor) -> Sequence[Tensor]:
    return (encoder(ids).pooler_output,)


def _clip_layers(encoder: Any, ids: Tensor, *, clip_skip: int) -> Sequence[Tensor]:
    """The projected embedding, the last hidden states but one, and those with layers skipped."""
    output = encoder(ids, output_hidden_states=True)
    plain = output.hidden_states[-2]
    return (output[0], plain, output.hidden_states[-(clip_skip + 2)]) if clip_skip else (
        output[0], plain,
    )  # fmt: skip
