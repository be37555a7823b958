"""Is what is trained on this device the truth? Gradients, ratios, images, bound adapters.

    python benchmarks/truth.py [--size sd15|tiny] [--device auto] [--compile]

For miniatures of every family, and for an architecture of `--size`, in float32, bfloat16 and
float16, compiled and not: the cosine of a gradient to that of float32 on the same device and the
share of its entries lost to zero; |ratio - 1| of the learner's first pass; the largest difference
of images, of 255, from a stock pipeline's on the same device; the change that an adapter makes to a
probe prompt's embedding, and what it costs to check that after a publication; peak memory. Writes
benchmarks/results/truth.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import ROOT, as_in_an_actor, write
from diffusers import DDIMScheduler, DiffusionPipeline
from full_size import make_pipeline
from torch import Tensor

from tests.miniatures import FAMILIES, build
from texforce_ray.config import Config
from texforce_ray.config.io import load_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.model.backbone import DTYPES, load_config_backbone
from texforce_ray.model.effect import EffectProbe
from texforce_ray.rl import ppo
from texforce_ray.rl.likelihood import Pairs
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.precision import agreement, in_float32
from texforce_ray.rl.sharding import UpdateBatch

PROMPTS = ("a green circle", "two red squares", "a green circle", "three blue triangles")
SEEDS = np.arange(4)
_TIMES = 20


def make_config(path: Path, dtype: str, steps: int, guidance: float, device: str) -> Config:
    """A small iteration on a pipeline."""
    storage = "float32" if dtype == "float32" else "float16"
    return load_config(
        ROOT / "configs" / "shapes.yaml",
        [
            f"model.path={path}", f"model.dtype={dtype}", f"model.device={device}",
            f"diffusion.storage_dtype={storage}", f"diffusion.steps={steps}",
            f"diffusion.guidance_scale={guidance}", "objective.timestep_choice=random",
            "objective.timestep_fraction=1.0", "prompts.per_iteration=2",
            "prompts.samples_per_prompt=2", "update.minibatches=1", "rollout.batch_size=4",
            "learner.microbatch_size=4", "lora.text_encoder.rank=16", "lora.text_encoder.alpha=16",
            "advantage.mode=batch",
        ],
    )  # fmt: skip


def measure(name: str, config: Config, device: str, *, compiled: bool) -> dict[str, Any]:
    """One row: see the module's text."""
    cuda, began = device.startswith("cuda"), time.perf_counter()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    backbone = load_config_backbone(config, num_gpus=1)
    if compiled:
        backbone.compile()
    learner, d = PpoLearner(backbone, config), config.diffusion
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # with B = 0 half of the gradient would be 0
        for p in learner.parameters:
            p.copy_((torch.randn(p.shape, generator=noise) * 0.02).to(p.device))
    sampler = Sampler(
        backbone,
        steps=d.steps,
        eta=d.eta,
        guidance_scale=d.guidance_scale,
        storage_dtype=d.storage_dtype,
        decode_batch_size=4,
    )
    trajectory, _ = sampler.sample(PROMPTS, SEEDS, 0)
    steps = np.tile(np.array(learner.process.trainable), (len(SEEDS), 1))
    pairs = Pairs.of(np.arange(len(SEEDS)), steps)
    stored = torch.from_numpy(trajectory.log_probs[pairs.sample, pairs.step])
    found = learner.likelihood.log_probs(trajectory, pairs).cpu()
    batch = UpdateBatch(trajectory, np.ones(len(SEEDS)), np.ones(len(SEEDS), dtype=bool))

    def gradient() -> list[Tensor]:
        return learner._probe(batch, np.arange(len(SEEDS)), steps)

    ours = gradient()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    with in_float32(backbone):
        exact = gradient()
    agreed = agreement(ours, exact)
    probe = EffectProbe(backbone)
    effect, costs = probe.measure(learner.adapter), []
    for _ in range(_TIMES):
        start = time.perf_counter()
        probe.measure(learner.adapter)  # it ends by reading numbers: all work is done then
        costs.append(time.perf_counter() - start)
    with learner.adapter.disabled():
        _, images = sampler.sample(PROMPTS, SEEDS, 0)
    seconds = time.perf_counter() - began
    return {
        "model": name,
        "dtype": config.model.dtype,
        "compiled": compiled,
        "cosine": agreed.cosine,
        "zeros": agreed.zeros,
        "ratio_error": ppo.ratio_error(found, stored),
        "ratio_error_median": float(torch.expm1(found - stored).abs().median()),
        "image_difference": difference(images, stock(config, device)),
        "effect": effect.change,
        "effect_seconds": median(costs),
        "layers": effect.layers,
        "peak_bytes": peak,
        "seconds": seconds,
    }


def stock(config: Config, device: str) -> np.ndarray:
    """Images of the stock pipeline with DDIM, uint8 [B, H, W, 3]."""
    d = config.diffusion
    pipe = DiffusionPipeline.from_pretrained(config.model.path, dtype=DTYPES[config.model.dtype])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.to(device)
    images = pipe(
        list(PROMPTS),
        num_inference_steps=d.steps,
        eta=d.eta,
        guidance_scale=d.guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(int(seed)) for seed in SEEDS],
        output_type="np",
    ).images
    return np.round(images * 255).astype(np.uint8)


def difference(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Largest and mean difference, of 255."""
    apart = np.abs(one.astype(int) - other.astype(int))
    return {"largest": int(apart.max()), "mean": float(apart.mean())}


def table(rows: list[dict[str, Any]]) -> list[str]:
    head = (
        "model", "networks", "compiled", "gradient's cosine", "zeros", "abs(r - 1), median",
        "largest", "images off by, mean", "largest", "effect", "its check (ms)", "GiB", "s",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "| " + "--- | " * len(head)]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['model']} | {r['dtype']} | | {r['error']} |" + " |" * 9)
            continue
        image = r["image_difference"]
        cells = (
            r["model"], r["dtype"], "yes" if r["compiled"] else "no", f"{r['cosine']:.5f}",
            f"{r['zeros']:.2%}", f"{r['ratio_error_median']:.0e}", f"{r['ratio_error']:.0e}",
            f"{image['mean']:.2f}", f"{image['largest']}", f"{r['effect']:.3f}",
            f"{1e3 * r['effect_seconds']:.1f}",
            f"{r['peak_bytes'] / 2**30:.1f}", f"{r['seconds']:.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=("sd15", "tiny"), default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    as_in_an_actor()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[tuple[str, Path, int, float, tuple[bool, ...]]] = []
        for family in options.families:
            path = Path(folder) / family
            build(path, family)
            steps, guidance = FAMILIES[family][4:6]
            # One of a kind is compiled: minutes otherwise.
            both = options.compile and family in ("sd15", "sdxl")
            jobs.append((f"{family}, miniature", path, steps, guidance, (False, True)[: 1 + both]))
        path = Path(folder) / options.size
        make_pipeline(path, options.size)
        jobs.append((f"{options.size}, random weights", path, 4, 5.0, (False,)))
        for name, path, steps, guidance, ways in jobs:
            for dtype in DTYPES:
                for compiled in ways:
                    config = make_config(path, dtype, steps, guidance, device)
                    try:
                        rows.append(measure(name, config, device, compiled=compiled))
                    except Exception as error:  # the other rows are worth having
                        why = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                        rows.append({"model": name, "dtype": dtype, "error": why})
                    print(table(rows[-1:])[-1], flush=True)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    versions = f"{name}, torch {torch.__version__}"
    write("truth", {"device": versions, "rows": rows}, [f"On {versions}.", "", *table(rows)])


if __name__ == "__main__":
    main()
