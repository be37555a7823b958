"""Stable Diffusion's families: CLIP text encoders, a U-Net with cross-attention, a VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from texforce_ray.artifacts.families import Family
from texforce_ray.diffusion.ddim import Ddim
from texforce_ray.diffusion.process import Process
from texforce_ray.model import attention
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.conditioning import PLAIN, Conditioning, Drawing, Prepared
from texforce_ray.model.transfer import to_device


class StableDiffusion(Backbone):
    """Stable Diffusion 1.x, 2.x and SD-Turbo: one CLIP text encoder."""

    blocks = ("ResnetBlock2D", "BasicTransformerBlock", "GroupNorm")

    def __init__(
        self, pipe: Any, family: Family, device: torch.device, drawing: Drawing = PLAIN
    ) -> None:
        super().__init__(pipe, family, device, drawing)
        self._cross_attention = attention.install(self.denoiser)
        self.scheduler: Any = self._scheduler()

    def _scheduler(self) -> Any:
        # Any scheduler that the directory names is replaced by DDIM with the same noise schedule;
        # clipping x_0 would make the closed-form likelihood wrong.
        return DDIMScheduler.from_config(
            self.pipe.scheduler.config, clip_sample=False, thresholding=False
        )

    def process(self, steps: int, eta: float, kernel: str = "cps") -> Process:
        """DDIM on the model's noise schedule, whatever the `kernel`."""
        del kernel
        return Ddim.of(self.scheduler, steps, eta).to(self.device)

    def _encode(self, ids: Sequence[Tensor], clip_skip: int | None) -> Conditioning:
        encoder, tokens = self.text_encoder, to_device(ids[0], self.device)
        if clip_skip is None:
            hidden = encoder(tokens, attention_mask=None)[0]
        else:
            layers = encoder(tokens, attention_mask=None, output_hidden_states=True).hidden_states
            # transformers 5.6 moved the layers of `text_model` into the model itself.
            norm = getattr(encoder, "text_model", encoder).final_layer_norm
            hidden = norm(layers[-(clip_skip + 1)])
        return Conditioning(hidden.to(self.dtype))

    def predict(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's output for x [B, C, h, w] at timesteps [B], each row with its own prompt."""
        return self.denoiser(
            x.to(self.dtype),
            timesteps,
            encoder_hidden_states=conditioning.hidden,
            added_cond_kwargs=self._added(conditioning.pooled, conditioning.time_ids),
        ).sample

    def prepare(self, conditioning: Conditioning) -> Prepared:
        """What the U-Net computes from P distinct prompts alone, with gradient."""
        shared = attention.keys_values(self._cross_attention, conditioning.hidden)
        return Prepared(shared, conditioning.pooled, conditioning.time_ids)

    def predict_prepared(
        self, x: Tensor, timesteps: Tensor, prepared: Prepared, rows: np.ndarray
    ) -> Tensor:
        """`predict`, where row b has prompt `rows[b]` (int64 [B]) of the prepared ones."""
        pooled, time_ids, shared = prepared.pooled, prepared.time_ids, prepared.context
        folded = attention.group_rows(rows)
        if self.compiled:
            # The number and order of prompts changes from batch to batch. Selecting them here
            # makes all shapes depend only on the batch size, so that nothing is recompiled.
            chosen = to_device(rows, self.device)
            shared = tuple(t.index_select(0, chosen).to(self.dtype) for t in shared)
            folded = np.arange(len(rows))
        groups = to_device(folded, self.device)
        if pooled is not None and time_ids is not None:
            index = to_device(rows, self.device)
            # Cast after selecting, like keys and values: see `attention`.
            pooled = pooled.index_select(0, index).to(self.dtype)
            time_ids = time_ids.index_select(0, index).to(self.dtype)
        return self.denoiser(
            x.to(self.dtype),
            timesteps,
            encoder_hidden_states=shared[0],  # only signals that there are prompts
            cross_attention_kwargs={"keys_values": shared, "groups": groups},
            added_cond_kwargs=self._added(pooled, time_ids),
        ).sample

    def _added(self, pooled: Tensor | None, time_ids: Tensor | None) -> dict[str, Tensor] | None:
        """Inputs of the U-Net besides the prompt's tokens."""
        del pooled, time_ids
        return None


class StableDiffusionXl(StableDiffusion):
    """SDXL and SDXL-Turbo: two text encoders, a pooled embedding, the image's size."""

    def __init__(
        self, pipe: Any, family: Family, device: torch.device, drawing: Drawing = PLAIN
    ) -> None:
        super().__init__(pipe, family, device, drawing)
        if self.vae.config.force_upcast:  # in half precision its decoder overflows: black images
            self.vae.float()
        _, height, width = self.latent_shape
        size = (height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)
        # Original size, crop, target size: an uncropped image of the pipeline's own size.
        self._time_ids = torch.tensor([*size, 0, 0, *size], device=device, dtype=self.dtype)

    def _encode(self, ids: Sequence[Tensor], clip_skip: int | None) -> Conditioning:
        hidden, pooled = [], None
        for encoder, part in zip(self.text_encoders, ids, strict=True):
            output = encoder(to_device(part, self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-((clip_skip or 0) + 2)].to(self.dtype))
            pooled = output[0]
        assert pooled is not None  # the second encoder's projection
        time_ids = self._time_ids.expand(len(ids[0]), -1)
        return Conditioning(torch.cat(hidden, dim=-1), pooled.to(self.dtype), time_ids)

    def encode_empty(self) -> Conditioning:
        empty = super().encode_empty()
        negative = self.drawing.negative_prompt is not None
        if negative or not self.pipe.config.force_zeros_for_empty_prompt:
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
