"""Pre-train the embedded latent-diffusion pipeline: `python -m texforce_ray.shapes.pretrain`.

A VAE first, then the latents of a fixed set of drawings, and on them a U-Net together with its
CLIP text encoder under captions in two registers. Every stage is resumable and all are a pure
function of the seed on one kind of machine. The result loads as a stock `StableDiffusionPipeline`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from texforce_ray.paths import local_path
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
from texforce_ray.shapes.tokenizer import build_tokenizer

_SHOW_EVERY = 20  # steps


@dataclass(frozen=True)
class Recipe:
    """Every choice that shapes the pre-trained weights."""

    seed: int = 0
    vae_steps: int = 3000
    vae_batch: int = 32
    vae_lr: float = 1.5e-3
    kl_weight: float = 1e-5
    drawings: int = 200_000
    steps: int = 24_000
    batch: int = 512
    lr: float = 1.5e-3
    warmup: int = 500
    ema_decay: float = 0.999
    careful: float = 0.5
    caption_dropout: float = 0.1
    most_weight: float = 20.0
    save_every: int = 1000


class _Stage:
    """A training stage that can be killed at any step and continues where it was."""

    def __init__(
        self, directory: Path, modules: dict[str, nn.Module], optimizer: torch.optim.AdamW
    ):
        self.directory, self.modules, self.optimizer = directory, modules, optimizer
        self.extra: dict[str, Tensor] = {}

    def load(self) -> int:
        """The step to continue from; 0 for a fresh start."""
        marker = self.directory / "step.json"
        if not marker.exists():
            return 0
        step = json.loads(marker.read_text())["step"]
        tensors = load_file(self.directory / f"step-{step}.safetensors")
        for name, module in self.modules.items():
            module.load_state_dict(_strip(tensors, f"{name}/"))
        self.extra = _strip(tensors, "extra/")
        for group in self.optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                state = _strip(tensors, f"optimizer/{i}/")
                step_at = parameter.device if group["fused"] else "cpu"
                self.optimizer.state[parameter] = {
                    key: value.to(step_at) if key == "step" else _laid_out_as(parameter, value)
                    for key, value in state.items()
                }
        return step

    def save(self, step: int) -> None:
        tensors = {f"extra/{key}": value for key, value in self.extra.items()}
        for name, module in self.modules.items():
            tensors |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
        for group in self.optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                state = self.optimizer.state[parameter]
                tensors |= {f"optimizer/{i}/{key}": value for key, value in state.items()}
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step-{step}.safetensors"
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
        # The marker moves last: a kill in between leaves the step before in force.
        temporary = self.directory / "step.json.tmp"
        temporary.write_text(json.dumps({"step": step}))
        os.replace(temporary, self.directory / "step.json")
        for old in self.directory.glob("step-*.safetensors"):
            if old != path:
                old.unlink()


def _laid_out_as(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """On its device and in its memory format: the fused optimizer reads both in memory's order."""
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 where it can do no harm: weights and optimizer stay in float32."""
    return torch.autocast(device.type, torch.bfloat16)


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then cosine to one percent."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress))


def _steps(
    stage: _Stage, start: int, dataset: Dataset[Any], save_every: int, title: str
) -> Iterator[tuple[int, Any, tqdm]]:
    """`(step, its batch, the progress bar)`; the stage is saved in between and at the end."""
    steps = range(start, len(dataset))  # type: ignore[arg-type]
    batches = in_order(dataset, steps)
    with tqdm(initial=start, total=start + len(steps), desc=title, mininterval=5) as bar:
        for step, batch in zip(steps, batches, strict=True):
            yield step, batch, bar
            bar.update()
            if (step + 1) % save_every == 0 or step + 1 == steps.stop:
                stage.save(step + 1)


def _update(
    optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], loss: Tensor, lr: float
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()  # before the next forward pass: a CUDA graph's gradients die with it


def train_vae(recipe: Recipe, work: Path) -> AutoencoderKL:
    """Stage 1: reconstruct drawings; a light KL keeps the latents near a unit Gaussian."""
    torch.manual_seed(recipe.seed)
    device = _device()
    vae = build_vae().to(device)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    stage = _Stage(work / "vae", {"vae": vae}, optimizer)
    start = stage.load()
    # Drawings of this stage have a seed of their own (an odd one), never the U-Net's.
    total = recipe.vae_steps * recipe.vae_batch
    pictures = Pictures(2 * recipe.seed + 1, recipe.vae_batch, total, data.VAE_KIND_WEIGHTS)
    for step, batch, bar in _steps(stage, start, pictures, recipe.save_every, "VAE"):
        x = batch.to(device)
        with _mixed_precision(device):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(
                posterior.mean.shape, generator=torch.Generator().manual_seed(recipe.seed + step)
            )
            output = vae.decode(posterior.mean + posterior.std * noise.to(device)).sample.float()
        # Differences between neighbours punish blurred outlines, which plain L1 hardly sees.
        edges = sum(
            (torch.diff(output, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (-1, -2)
        )
        error = (output - x).abs().mean() + 2 * (output - x).square().mean()
        loss = error + edges + recipe.kl_weight * posterior.kl().mean()
        lr = recipe.vae_lr * _cosine(step, recipe.vae_steps, 50)
        _update(optimizer, parameters, loss, lr)
        if step % _SHOW_EVERY == 0:  # each look waits for the GPU
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
    """How often each timestep is trained: as 1 + 1/SNR, capped.

    Weighting the loss so has the same gradient on average and more noise in it. What is in an
    image is decided where noise prevails, and uniform timesteps hardly train that.
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
    """Noise prediction under captions in two registers; U-Net and encoder with EMA weights."""
    torch.manual_seed(recipe.seed + 1)
    device = _device()
    unet = build_unet().to(device, memory_format=torch.channels_last).train()
    text_encoder = build_text_encoder(tokenizer).to(device).train()
    if device.type == "cpu":  # fused attention's backward pass in bfloat16 takes half of a step
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    predict: Callable[..., Tensor] = _Denoiser(unet, text_encoder)
    if compiled:
        # On a GPU the networks are so small that starting kernels is what takes time.
        predict = torch.compile(predict, mode="reduce-overhead" if device.type == "cuda" else None)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    averages = EMAModel(parameters, decay=recipe.ema_decay, foreach=True)
    stage = _Stage(work / "unet", {"unet": unet, "text_encoder": text_encoder}, optimizer)
    if start := stage.load():
        averages.shadow_params = [
            _laid_out_as(parameter, stage.extra[f"ema.{i}"])
            for i, parameter in enumerate(parameters)
        ]
        averages.optimization_step = start
    alphas = build_scheduler().alphas_cumprod
    batches = NoisyLatents(
        recipe.seed,
        recipe.batch,
        recipe.steps,
        latents,
        alphas,
        _noise_levels(alphas, recipe.most_weight),
        tokenizer,
        careful=recipe.careful,
        caption_dropout=recipe.caption_dropout,
    )
    for step, batch, bar in _steps(stage, start, batches, recipe.save_every, "U-Net"):
        ids, noisy, t, noise = (tensor.to(device, non_blocking=True) for tensor in batch)
        with _mixed_precision(device):
            output = predict(ids, noisy.contiguous(memory_format=torch.channels_last), t)
        loss = (output.float() - noise).square().mean()
        _update(optimizer, parameters, loss, recipe.lr * _cosine(step, recipe.steps, recipe.warmup))
        averages.step(parameters)
        stage.extra = {f"ema.{i}": p for i, p in enumerate(averages.shadow_params)}
        if step % _SHOW_EVERY == 0:
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
    for part in ("vae", "unet"):  # diffusers notes the folder of this machine that it came from
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=local_path, required=True, help="directory of the finished pipeline"
    )
    parser.add_argument(
        "--work", type=local_path, help="state for resuming (default: OUT/../OUT.work)"
    )
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the U-Net: needs a C++ compiler"
    )
    arguments = vars(parser.parse_args())
    out, work, compiled = (arguments.pop(key) for key in ("out", "work", "compile"))
    work = work or out.with_name(out.name + ".work")
    pretrain(Recipe(**arguments), out, work, compiled=compiled)
    print(f"pipeline written to {out}")


def pretrain(recipe: Recipe, out: Path, work: Path, *, compiled: bool = False) -> None:
    """Train a pipeline from nothing into `out`; `work` keeps the state for resuming."""
    work.mkdir(parents=True, exist_ok=True)
    _check_recipe(recipe, work / "recipe.json")
    tokenizer = build_tokenizer(vocabulary())
    vae = train_vae(recipe, work)
    mean, std = encode_drawings(recipe, vae, work)
    scaling = 1 / float((mean.var() + std.square().mean()).sqrt())
    latents = (mean * scaling, std * scaling)
    unet, text_encoder = train_unet(recipe, work, latents, tokenizer, compiled=compiled)
    export(out, vae, unet, text_encoder, tokenizer, scaling, recipe)


def _check_recipe(recipe: Recipe, path: Path) -> None:
    """A resumed training must be the same training."""
    if not path.exists():
        path.write_text(json.dumps(asdict(recipe)))
        return
    before, now = json.loads(path.read_text()), asdict(recipe)
    different = [key for key in now if before.get(key) != now[key]]
    if different:
        raise SystemExit(
            f"{path} was made with other values of {', '.join(different)}; "
            "choose another --work directory, or the values found there"
        )


if __name__ == "__main__":
    main()
