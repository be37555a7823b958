"""Pre-train the embedded latent-diffusion pipeline: `python -m texforce_ray.shapes.pretrain`.

A VAE first, then rounds: the latents of a fixed set of drawings, and on them a U-Net together with
its CLIP text encoder under noisy captions. A later round goes on from the exported (fp16) weights
of the one before, on drawings of its own. Every stage is resumable and all are a pure function of
the seed on one kind of machine. The result loads as a stock `StableDiffusionPipeline`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from texforce_ray.paths import local_path
from texforce_ray.shapes import data, people, scene
from texforce_ray.shapes.networks import (
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
)
from texforce_ray.shapes.older_versions import name_as_older_versions_do, write_vocabulary
from texforce_ray.shapes.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Every choice that shapes the pre-trained weights."""

    seed: int = 0
    vae_steps: int = 2800
    vae_batch: int = 32
    vae_lr: float = 1.5e-3
    kl_weight: float = 1e-5
    drawings: int = 32_000
    steps: int = 5000
    refine_steps: int = 4500
    batch: int = 64
    lr: float = 1e-3
    refine_lr: float = 8e-4
    warmup: int = 200
    ema_decay: float = 0.998
    caption_swap: float = 0.25
    caption_dropout: float = 0.1
    save_every: int = 250


def vocabulary() -> list[str]:
    """Every word that a caption of the world can hold."""
    captions = [s.caption for ability in scene.ABILITIES for s in scene.all_scenes(ability)]
    captions += [people.hand_caption(), people.face_caption()]
    for tone in people.SKIN_TONES:
        captions += [people.hand_caption(people.HandSpec(tone, side)) for side in people.SIDES]
        captions += [people.face_caption(people.FaceSpec(tone, smiles)) for smiles in (False, True)]
    return sorted({word for caption in captions for word in caption.split()})


def _pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 images to float32 [B, 3, H, W] in [-1, 1]."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


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
                self.optimizer.state[parameter] = _strip(tensors, f"optimizer/{i}/")
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


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then cosine to one percent."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress))


def _steps(
    stage: _Stage, start: int, steps: int, save_every: int, title: str
) -> Iterator[tuple[int, tqdm]]:
    with tqdm(range(start, steps), initial=start, total=steps, desc=title, mininterval=5) as bar:
        for step in bar:
            yield step, bar
            if (step + 1) % save_every == 0 or step + 1 == steps:
                stage.save(step + 1)


def _update(
    optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], loss: Tensor, lr: float
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def train_vae(recipe: Recipe, work: Path) -> AutoencoderKL:
    """Stage 1: reconstruct drawings; a light KL keeps the latents near a unit Gaussian."""
    torch.manual_seed(recipe.seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    stage = _Stage(work / "vae", {"vae": vae}, optimizer)
    start = stage.load()
    for step, bar in _steps(stage, start, recipe.vae_steps, recipe.save_every, "VAE"):
        first = step * recipe.vae_batch
        # Drawings of this stage have indices of their own (odd seeds), never the U-Net's.
        indices = range(first, first + recipe.vae_batch)
        x = _pixels(
            [data.draw(2 * recipe.seed + 1, i, data.VAE_KIND_WEIGHTS).image for i in indices]
        )
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(
            posterior.mean.shape, generator=torch.Generator().manual_seed(recipe.seed + step)
        )
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        # Differences between neighbours punish blurred outlines, which plain L1 hardly sees.
        edges = sum(
            (torch.diff(output, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (-1, -2)
        )
        error = (output - x).abs().mean() + 2 * (output - x).square().mean()
        loss = error + edges + recipe.kl_weight * posterior.kl().mean()
        lr = recipe.vae_lr * _cosine(step, recipe.vae_steps, 50)
        _update(optimizer, parameters, loss, lr)
        bar.set_postfix(l1=f"{(output - x).abs().mean().item():.4f}", refresh=False)
    return vae.eval()


@dataclass
class Round:
    """One pass of U-Net training: where it works, what it sees, what it starts from."""

    work: Path
    first_drawing: int
    stream: int
    steps: int
    lr: float
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel


@torch.no_grad()
def encode_drawings(recipe: Recipe, this: Round) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of a round's drawings, float32 [N, 4, 8, 8] each."""
    path = this.work / "latents.safetensors"
    if not path.exists():
        this.work.mkdir(parents=True, exist_ok=True)
        means, stds = [], []
        for first in tqdm(range(0, recipe.drawings, 64), desc="latents", mininterval=5):
            indices = range(first, min(first + 64, recipe.drawings))
            images = [data.draw(2 * recipe.seed, this.first_drawing + i).image for i in indices]
            posterior = this.vae.encode(_pixels(images)).latent_dist
            means.append(posterior.mean.contiguous())
            stds.append(posterior.std.contiguous())
        temporary = path.with_suffix(".tmp")
        save_file({"mean": torch.cat(means), "std": torch.cat(stds)}, temporary)
        os.replace(temporary, path)
    tensors = load_file(path)
    return tensors["mean"], tensors["std"]


def _captioners(recipe: Recipe, this: Round) -> list[Callable[[np.random.Generator, float], str]]:
    indices = range(this.first_drawing, this.first_drawing + recipe.drawings)
    bar = tqdm(indices, desc="captions", mininterval=5)
    return [data.draw(2 * recipe.seed, i).caption for i in bar]


def train_unet(
    recipe: Recipe,
    this: Round,
    latents: tuple[Tensor, Tensor],
    scaling: float,
    tokenizer: CLIPTokenizer,
) -> None:
    """Noise prediction on noisy captions; leaves the round's U-Net and encoder with EMA weights."""
    unet = this.unet.to(memory_format=torch.channels_last).train()
    text_encoder = this.text_encoder.train()
    mean, std = latents
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-3)
    averages = EMAModel(parameters, decay=recipe.ema_decay)
    stage = _Stage(this.work / "unet", {"unet": unet, "text_encoder": text_encoder}, optimizer)
    if start := stage.load():
        averages.shadow_params = [stage.extra[f"ema.{i}"] for i in range(len(parameters))]
        averages.optimization_step = start
    captioners = _captioners(recipe, this)
    alphas = build_scheduler().alphas_cumprod
    for step, bar in _steps(stage, start, this.steps, recipe.save_every, "U-Net"):
        rng = np.random.default_rng([recipe.seed, this.stream, step])
        torch_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = rng.integers(recipe.drawings, size=recipe.batch)
        captions = [
            "" if rng.random() < recipe.caption_dropout else captioners[i](rng, recipe.caption_swap)
            for i in chosen
        ]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        rows = torch.from_numpy(chosen)
        x = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=torch_rng)
        noise = torch.randn(x.shape, generator=torch_rng)
        t = torch.randint(0, len(alphas), (len(x),), generator=torch_rng)
        alpha = alphas[t][:, None, None, None]
        noisy = alpha.sqrt() * x * scaling + (1 - alpha).sqrt() * noise
        hidden = text_encoder(ids.input_ids).last_hidden_state
        loss = (unet(noisy, t, hidden).sample - noise).square().mean()
        lr = this.lr * _cosine(step, this.steps, recipe.warmup)
        _update(optimizer, parameters, loss, lr)
        averages.step(parameters)
        stage.extra = {f"ema.{i}": p for i, p in enumerate(averages.shadow_params)}
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    averages.copy_to(parameters)
    unet.eval()
    text_encoder.eval()


def train_round(recipe: Recipe, this: Round, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Train a round to its end and write its pipeline to `out`."""
    latents = encode_drawings(recipe, this)
    scaling = this.vae.config.scaling_factor
    if this.first_drawing == 0:
        mean, std = latents
        scaling = 1 / float((mean.var() + std.square().mean()).sqrt())
    train_unet(recipe, this, latents, scaling, tokenizer)
    export(out, this.vae, this.unet, this.text_encoder, tokenizer, scaling, recipe)


def refinement(recipe: Recipe, work: Path, pipeline: Path) -> Round:
    """The round that goes on from an exported pipeline's weights."""
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, dtype=torch.float32)
    return Round(
        work,
        recipe.drawings,
        2,
        recipe.refine_steps,
        recipe.refine_lr,
        pipe.vae,
        pipe.unet,
        pipe.text_encoder,
    )


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
    arguments = vars(parser.parse_args())
    out, work = arguments.pop("out"), arguments.pop("work")
    pretrain(Recipe(**arguments), out, work or out.with_name(out.name + ".work"))
    print(f"pipeline written to {out}")


def pretrain(recipe: Recipe, out: Path, work: Path) -> None:
    """Train a pipeline from nothing into `out`; `work` keeps the state for resuming."""
    work.mkdir(parents=True, exist_ok=True)
    _check_recipe(recipe, work / "recipe.json")
    tokenizer = build_tokenizer(vocabulary())
    vae = train_vae(recipe, work)
    torch.manual_seed(recipe.seed + 1)
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    first = Round(work, 0, 1, recipe.steps, recipe.lr, vae, unet, text_encoder)
    if not (work / "first" / "recipe.json").exists():  # an export's last file
        train_round(recipe, first, tokenizer, work / "first")
    train_round(recipe, refinement(recipe, work / "refined", work / "first"), tokenizer, out)


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
