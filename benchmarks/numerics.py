"""Do sampler and learner agree? |ratio - 1| on the first pass, by dtype, compilation, batch shape.

    python benchmarks/numerics.py [--dtypes float32 bfloat16 float16] [--compile] [--device cpu]

PPO's clip range of 1e-4 means something only if recomputing a sample's log-probability with the
weights that sampled it gives what was stored, to an order of magnitude better than that. Samples
are drawn in batches of one size and recomputed in microbatches of others. Writes
benchmarks/results/numerics.json and numerics.md.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import ROOT, write

from texforce_ray.config.io import load_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.model.backbone import load_backbone
from texforce_ray.rl import ppo
from texforce_ray.rl.likelihood import Pairs
from texforce_ray.rl.ppo_learner import PpoLearner

PROMPTS = ("a green circle", "three red squares", "a red circle and a blue square")
CLIP_RANGE = 1e-4


def measure(
    dtype: str, storage: str, *, compiled: bool, device: str, samples: int, microbatches: list[int]
) -> list[dict]:
    """The error of each microbatch size, against samples drawn in batches of `samples`."""
    config = load_config(
        ROOT / "configs" / "shapes.yaml",
        [
            f"model.dtype={dtype}",
            f"diffusion.storage_dtype={storage}",
            "diffusion.guidance_scale=5",
            "lora.text_encoder.rank=16",
        ],
    )
    backbone = load_backbone("embedded", dtype=dtype, device=device)
    if compiled:
        backbone.compile()
    learner = PpoLearner(backbone, config)
    # A policy some way from the base: with B = 0 the adapter would not be tested.
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learner.parameters:
            noise = torch.randn(parameter.shape, generator=rng) * 0.03
            parameter.copy_(noise.to(parameter.device))
    d = config.diffusion
    sampler = Sampler(
        backbone,
        steps=d.steps,
        eta=d.eta,
        guidance_scale=d.guidance_scale,
        storage_dtype=storage,
        decode_batch_size=8,
    )
    prompts = [PROMPTS[i * len(PROMPTS) // samples] for i in range(samples)]
    trajectory, _ = sampler.sample(prompts, np.arange(samples), 0)
    steps = np.tile(np.array(learner.process.trainable), (samples, 1))
    pairs = Pairs.of(np.arange(samples), steps)
    stored = torch.from_numpy(trajectory.log_probs[pairs.sample, pairs.step])
    rows = []
    for size in microbatches:
        found = learner.likelihood.log_probs(trajectory, pairs, size).cpu()
        error = ppo.ratio_error(found, stored)
        typical = float(torch.expm1(found - stored).abs().median())
        rows.append(
            {
                "dtype": dtype,
                "latents": storage,
                "compiled": compiled,
                "sampled_in": samples,
                "recomputed_in": size,
                "largest": error,
                "median": typical,
                "inside": error <= CLIP_RANGE / 10,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[7, 12, 64])
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = []
    for dtype in options.dtypes:
        for storage in ("float32", "float16"):
            for compiled in (False, True) if options.compile else (False,):
                rows += measure(
                    dtype,
                    storage,
                    compiled=compiled,
                    device=options.device,
                    samples=options.samples,
                    microbatches=options.microbatches,
                )
    table = [
        "| networks | latents | compiled | sampled in | recomputed in | largest | median "
        f"| inside {CLIP_RANGE / 10:.0e} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {r['dtype']} | {r['latents']} | {'yes' if r['compiled'] else 'no'} "
            f"| {r['sampled_in']} | {r['recomputed_in']} | {r['largest']:.1e} | {r['median']:.1e} "
            f"| {'yes' if r['inside'] else 'no'} |"
            for r in rows
        ),
    ]
    result = {"device": options.device, "clip_range": CLIP_RANGE, "rows": rows}
    write("numerics", result, table)


if __name__ == "__main__":
    main()
