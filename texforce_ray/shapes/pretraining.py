"""Pre-trains the embedded latent-diffusion pipeline.

First a VAE, then the latents of a fixed set of drawings, and on them a U-Net together with its CLIP
text encoder, with captions in two registers. Every stage is resumable and, on one kind of machine,
a pure function of the seed. The result loads as a stock `StableDiffusionPipeline`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from texforce_ray.errors import ConfigError
from texforce_ray.shapes import data
from texforce_ray.shapes.batches import NoisyLatents, Pictures, in_order
from texforce_ray.shapes.captions import vocabulary
from texforce_ray.shapes.networks import (
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
)
from texforce_ray.shapes.older_versions import name_as_older_versions_do, write_vocabulary
from texforce_ray.shapes.recipe import Recipe
from texforce_ray.shapes.stages import Stage
from texforce_ray.shapes.tokenizer import build_tokenizer
from texforce_ray.shapes.training import (
    SHOW_EVERY,
    averaged,
    cosine,
    device_of,
    mixed_precision,
    resumed,
    steps_of,
    update,
)


def train_vae(recipe: Recipe, work: Path) -> AutoencoderKL:
    """Stage 1: reconstruct drawings; a light KL keeps the latents near a unit Gaussian."""
    torch.manual_seed(recipe.seed)
    device = device_of()
    vae = build_vae().to(device)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    stage = Stage(work / "vae", {"vae": vae}, optimizer)
    start = stage.load()
    # Drawings of this stage have a seed of their own (an odd one), never the U-Net's.
    total = recipe.vae_steps * recipe.vae_batch
    pictures = Pictures(2 * recipe.seed + 1, recipe.vae_batch, total, data.VAE_KIND_WEIGHTS)
    for step, batch, bar in steps_of(stage, start, pictures, recipe.save_every, "VAE"):
        x = batch.to(device)
        with mixed_precision(device):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(
                posterior.mean.shape, generator=torch.Generator().manual_seed(recipe.seed + step)
            )
            output = vae.decode(posterior.mean + posterior.std * noise.to(device)).sample.float()
        # Differences between neighbours penalize blurred outlines, which plain L1 hardly does.
        edges = sum(
            (torch.diff(output, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (-1, -2)
        )
        error = (output - x).abs().mean() + 2 * (output - x).square().mean()
        loss = error + edges + recipe.kl_weight * posterior.kl().mean()
        lr = recipe.vae_lr * cosine(step, recipe.vae_steps, 50)
        update(optimizer, parameters, loss, lr)
        if step % SHOW_EVERY == 0:  # reading the loss waits for the GPU
            bar.set_postfix(l1=f"{(output - x).abs().mean().item():.4f}", refresh=False)
    return vae.eval()


@torch.no_grad()
def encode_drawings(recipe: Recipe, vae: AutoencoderKL, work: Path) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of every drawing, float32 [N, 4, 8, 8] each."""
    path = work / "latents.safetensors"
    if not path.exists():
        means, stds = [], []
        pictures = Pictures(2 * recipe.seed, 64, recipe.drawings)
        batches = in_order(pictures, range(len(pictures)))
        for batch in tqdm(batches, total=len(pictures), desc="latents", mininterval=5):
            posterior = vae.encode(batch.to(vae.device)).latent_dist
            means.append(posterior.mean.contiguous().cpu())
            stds.append(posterior.std.contiguous().cpu())
        temporary = path.with_suffix(".tmp")
        save_file({"mean": torch.cat(means), "std": torch.cat(stds)}, temporary)
        os.replace(temporary, path)
    tensors = load_file(path)
    return tensors["mean"], tensors["std"]


def _noise_levels(alphas: Tensor, most_weight: float) -> Tensor:
    """How often each timestep is trained: proportional to 1 + 1/SNR, capped.

    Weighting the loss like this would give the same gradient on average, but a noisier one. An
    image's content is decided at high noise, which uniform timesteps hardly train.
    """
    weights = (1 / alphas).clamp(max=most_weight)  # 1 + (1 - alpha) / alpha
    return weights / weights.sum()


class _Denoiser(nn.Module):
    """Text encoder and U-Net as one function: token ids [B, L], latents, timesteps to noise."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, ids: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        return self.unet(noisy, t, self.text_encoder(ids).last_hidden_state).sample


def train_unet(
    recipe: Recipe,
    work: Path,
    latents: tuple[Tensor, Tensor],
    tokenizer: CLIPTokenizer,
    *,
    compiled: bool,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Noise prediction with captions in two registers; U-Net and encoder with EMA weights."""
    torch.manual_seed(recipe.seed + 1)
    device = device_of()
    unet = build_unet().to(device, memory_format=torch.channels_last).train()
    text_encoder = build_text_encoder(tokenizer).to(device).train()
    if device.type == "cpu":  # in bfloat16, fused attention's backward pass takes half of a step
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    predict: Callable[..., Tensor] = _Denoiser(unet, text_encoder)
    if compiled:
        # The networks are so small that on a GPU, launching kernels dominates.
        predict = torch.compile(predict, mode="reduce-overhead" if device.type == "cuda" else None)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    stage = Stage(work / "unet", {"unet": unet, "text_encoder": text_encoder}, optimizer)
    start, averages = resumed(stage, parameters, recipe.ema_decay)
    alphas = build_scheduler().alphas_cumprod
    levels = _noise_levels(alphas, recipe.most_weight)
    batches = NoisyLatents(recipe, latents, alphas, levels, tokenizer)
    for step, batch, bar in steps_of(stage, start, batches, recipe.save_every, "U-Net"):
        ids, noisy, t, noise = (tensor.to(device, non_blocking=True) for tensor in batch)
        with mixed_precision(device):
            output = predict(ids, noisy.contiguous(memory_format=torch.channels_last), t)
        loss = (output.float() - noise).square().mean()
        update(optimizer, parameters, loss, recipe.lr * cosine(step, recipe.steps, recipe.warmup))
        averaged(stage, averages, parameters)
        if step % SHOW_EVERY == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    averages.copy_to(parameters)
    return unet.eval(), text_encoder.eval()


def export(
    out: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scaling: float,
    recipe: Recipe,
) -> None:
    """Write the pipeline in fp16 safetensors, with the recipe beside it."""
    vae.register_to_config(scaling_factor=round(scaling, 6))
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for part in ("vae", "unet"):  # diffusers records a folder of this machine
        file = out / part / "config.json"
        settings = json.loads(file.read_text())
        settings.pop("_name_or_path", None)
        file.write_text(json.dumps(settings, indent=2) + "\n")
    # transformers loads in the dtype that the config names, diffusers in float32: make them agree.
    config = out / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    name_as_older_versions_do(out / "text_encoder" / "model.safetensors")
    write_vocabulary(out / "tokenizer")
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def pretrain(recipe: Recipe, out: Path, work: Path, *, compiled: bool = False) -> None:
    """Train a pipeline from scratch into `out`; `work` keeps the state for resuming."""
    work.mkdir(parents=True, exist_ok=True)
    check_recipe(recipe, work / "recipe.json")
    tokenizer = build_tokenizer(vocabulary())
    vae = train_vae(recipe, work)
    mean, std = encode_drawings(recipe, vae, work)
    scaling = 1 / float((mean.var() + std.square().mean()).sqrt())
    latents = (mean * scaling, std * scaling)
    unet, text_encoder = train_unet(recipe, work, latents, tokenizer, compiled=compiled)
    export(out, vae, unet, text_encoder, tokenizer, scaling, recipe)


def check_recipe(recipe: Recipe, path: Path) -> None:
    """Raise ConfigError if a training is resumed with another recipe."""
    if not path.exists():
        path.write_text(json.dumps(asdict(recipe)))
        return
    before, now = json.loads(path.read_text()), asdict(recipe)
    different = [key for key in now if before.get(key) != now[key]]
    if different:
        raise ConfigError(
            f"{path} was written with other values of {', '.join(different)}; "
            "choose another --work directory, or use the values stored there"
        )
