"""Pre-trains the embedded flow pipeline, a miniature of Stable Diffusion 3.

The VAE and the first text encoder are the DDIM pipeline's, frozen, so that an adapter of that
encoder can be tried in both. An MM-DiT is trained together with the two other encoders and the
first one's projection. Resumable like `pretraining`, with the same drawings and captions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from texforce_ray.artifacts.location import EMBEDDED
from texforce_ray.shapes.batches import FlowLatents
from texforce_ray.shapes.captions import vocabulary
from texforce_ray.shapes.flow_networks import (
    build_clip,
    build_scheduler,
    build_t5,
    build_t5_tokenizer,
    build_transformer,
)
from texforce_ray.shapes.older_versions import name_as_older_versions_do, write_vocabulary
from texforce_ray.shapes.pretraining import check_recipe, encode_drawings
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


class FlowNetworks(nn.Module):
    """Three encoders and a transformer as one function: token ids and latents to a velocity."""

    def __init__(self, clip: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = build_clip(clip, second=False)
        self.text_encoder_2 = build_clip(clip, second=True)
        self.text_encoder_3: T5EncoderModel = build_t5(build_t5_tokenizer(vocabulary()))
        self.transformer: SD3Transformer2DModel = build_transformer()
        shared = CLIPTextModel.from_pretrained(EMBEDDED / "text_encoder")
        body(self.text_encoder).load_state_dict(body(shared).state_dict())
        body(self.text_encoder).requires_grad_(False)

    def forward(self, ids: Tensor, t5_ids: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Velocity at timesteps t [B] of 1000 for token ids [B, L], as the stock pipeline's."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        hidden = torch.cat([clip, self.text_encoder_3(t5_ids)[0]], dim=1)
        pooled = torch.cat([first[0], second[0]], -1)
        return self.transformer(noisy, hidden, pooled, t).sample

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


def body(encoder: CLIPTextModel | CLIPTextModelWithProjection) -> nn.Module:
    """The encoder without its projection, in any version of transformers."""
    return getattr(encoder, "text_model", encoder)


def train_flow(
    recipe: Recipe, work: Path, latents: tuple[Tensor, Tensor], *, compiled: bool
) -> FlowNetworks:
    """Velocity prediction with captions in two registers; all trained weights are averages."""
    torch.manual_seed(recipe.seed + 1)
    device = device_of()
    tokenizer, t5_tokenizer = build_tokenizer(vocabulary()), build_t5_tokenizer(vocabulary())
    networks = FlowNetworks(tokenizer).to(device).train()
    predict: Callable[..., Tensor] = networks
    if compiled:
        predict = torch.compile(networks, mode="reduce-overhead" if device.type == "cuda" else None)
    parameters = networks.trained()
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    stage = Stage(work / "flow", {"flow": networks}, optimizer)
    start, averages = resumed(stage, parameters, recipe.ema_decay)
    batches = FlowLatents(recipe, latents, (tokenizer, t5_tokenizer))
    for step, batch, bar in steps_of(stage, start, batches, recipe.save_every, "MM-DiT"):
        ids, t5_ids, noisy, t, velocity = (b.to(device, non_blocking=True) for b in batch)
        # Fused attention's backward pass is slow in bfloat16 on a CPU.
        with mixed_precision(device), sdpa_kernel([SDPBackend.MATH]):
            output = predict(ids, t5_ids, noisy, t)
        loss = (output.float() - velocity).square().mean()
        update(optimizer, parameters, loss, recipe.lr * cosine(step, recipe.steps, recipe.warmup))
        averaged(stage, averages, parameters)
        if step % SHOW_EVERY == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    averages.copy_to(parameters)
    return networks.eval()


def export(
    out: Path, vae: AutoencoderKL, networks: FlowNetworks, scaling: float, recipe: Recipe
) -> None:
    """Write the pipeline in fp16 safetensors, with the recipe beside it."""
    vae.register_to_config(scaling_factor=round(scaling, 6), shift_factor=0.0)
    tokenizer = build_tokenizer(vocabulary())
    pipe = StableDiffusion3Pipeline(
        transformer=networks.transformer,
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=networks.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=networks.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=networks.text_encoder_3,
        tokenizer_3=build_t5_tokenizer(vocabulary()),
    )
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for part in ("vae", "transformer"):  # diffusers records a folder of this machine
        file = out / part / "config.json"
        settings = json.loads(file.read_text())
        settings.pop("_name_or_path", None)
        file.write_text(json.dumps(settings, indent=2) + "\n")
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        # transformers loads in the dtype that the config names, diffusers in float32.
        config = out / part / "config.json"
        config.write_text(config.read_text().replace('"float16"', '"float32"'))
    for part, words in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        name_as_older_versions_do(out / part / "model.safetensors")
        write_vocabulary(out / words)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def pretrain_flow(recipe: Recipe, out: Path, work: Path, *, compiled: bool = False) -> None:
    """Train a flow pipeline into `out`; `work` keeps the state for resuming."""
    work.mkdir(parents=True, exist_ok=True)
    check_recipe(recipe, work / "recipe.json")
    vae = AutoencoderKL.from_pretrained(EMBEDDED / "vae").to(device_of()).eval()
    mean, std = encode_drawings(recipe, vae, work)
    scaling = 1 / float((mean.var() + std.square().mean()).sqrt())
    latents = (mean * scaling, std * scaling)
    networks = train_flow(recipe, work, latents, compiled=compiled)
    export(out, vae.cpu(), networks.cpu(), scaling, recipe)
