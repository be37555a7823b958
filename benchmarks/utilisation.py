"""How near to the device's limit rollout and learner are, and what eats the rest.

    python benchmarks/utilisation.py [--size NAME] [--batches N ...] [--title NAME]
                                     [--pipeline FOLDER] [--no-profile] [--device auto]
                                     [key.sub=value ...]

Model FLOPs over time, as a share of this run's best matrix product in the networks' dtype, for each
batch size; samples/s of rollout and whole loop (one after the other); peak memory; and the
operations that take longest. Sizes: sd15 and sd35 (published architectures at random weights), tiny
and tiny-flow (to try the script with), shapes. Writes benchmarks/results/utilisation[-NAME].json
and .md. A pipeline of several GB is made once, in FOLDER, for several calls.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, as_in_an_actor, write
from full_size import make_pipeline
from torch.profiler import ProfilerActivity, profile

from texforce_ray.config import Config
from texforce_ray.config.io import load_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.model.backbone import load_config_backbone
from texforce_ray.model.flops import matmul_peak, pair_flops, sample_flops
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.sharding import UpdateBatch

_SHOWN = 8
SIZES = {
    "sd15": (2, 4, 8, 16, 32),
    "sd35": (4, 8, 16, 32),
    "tiny": (2, 4),
    "tiny-flow": (2, 4),
    "shapes": (8, 32),
}
_DTYPES = {"sd15": "float16", "sd35": "bfloat16"}


class Work:
    """A rollout unit and an update of `size` samples, few steps of each."""

    def __init__(self, config: Config, device: str) -> None:
        self.config = config
        self.backbone = load_config_backbone(
            config.changed({"model.device": device}), float(device == "cuda")
        )
        self.learner = PpoLearner(self.backbone, config)
        self.sampler = Sampler.of(self.backbone, config).at(config, 0)
        self.started = self.learner.learned()

    def flops(self, size: int) -> tuple[int, int]:
        """Of the rollout and of the update."""
        d = self.config.diffusion
        pairs = size * self.config.trained_timesteps
        return (
            size * sample_flops(self.backbone, d.steps, d.guidance_scale),
            pairs * pair_flops(self.backbone, d.guidance_scale),
        )

    def rollout(self, size: int) -> Any:
        return self.sampler.sample(["a green circle"] * size, np.arange(size), 0)[0]

    def restart(self) -> None:
        """Back to the weights that sampled: an update is of a whole iteration, then published."""
        self.learner.load(self.started)

    def update(self, size: int, trajectory: Any) -> None:
        advantages = np.linspace(-1, 1, size)
        self.learner.update(UpdateBatch(trajectory, advantages, np.ones(size, dtype=bool)))


def timed(
    device: torch.device, work: Callable[[], Any], between: Callable[[], Any] = lambda: None
) -> tuple[float, int]:
    """Seconds of the second call, and peak bytes on a GPU; `between` is not timed."""
    work()
    between()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    between()
    return seconds, torch.cuda.max_memory_allocated() if cuda else 0


def longest(device: torch.device, work: Callable[[], Any]) -> list[tuple[str, float]]:
    """Operations by their share of the time."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        work()
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = profiled.key_averages()
    total = sum(getattr(event, name) for event in events) or 1.0
    found = [(event.key, getattr(event, name) / total) for event in events]
    return sorted(found, key=lambda pair: -pair[1])[:_SHOWN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=tuple(SIZES), default="shapes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes, in place of the usual")
    parser.add_argument("--no-profile", action="store_true", help="only speed and memory")
    parser.add_argument("--title", help="name of the results; by default, the size")
    parser.add_argument("--pipeline", type=Path, help="where the pipeline is, or is made and left")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    as_in_an_actor()
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.batches or SIZES[options.size]:
            try:
                rows.append(measured(Work(_config(options, Path(folder), size), name), size))
            except torch.cuda.OutOfMemoryError:
                break
            report(options, name, rows, {})
        if rows and not options.no_profile:
            size = rows[-1]["size"]
            work = Work(_config(options, Path(folder), size), name)
            trajectory, device = work.rollout(size), work.backbone.device
            work.update(size, trajectory)  # the first one checks the gradient, and compiles
            work.restart()
            shares = {
                "rollout": longest(device, lambda: work.rollout(size)),
                "learner": longest(device, lambda: work.update(size, trajectory)),
            }
            report(options, name, rows, shares)


def measured(work: Work, size: int) -> dict[str, Any]:
    """A row of the table: speed, shares of the peak, and memory of one batch size."""
    trajectory, device = work.rollout(size), work.backbone.device
    peak = matmul_peak(device, work.backbone.dtype)
    rollout, rollout_bytes = timed(device, lambda: work.rollout(size))
    update, update_bytes = timed(device, lambda: work.update(size, trajectory), work.restart)
    sampled, trained = work.flops(size)
    return {
        "size": size,
        "rollout": sampled / rollout / peak,
        "learner": trained / update / peak,
        "rollout_samples_per_second": size / rollout,
        "learner_samples_per_second": size / update,
        "loop": (sampled + trained) / (rollout + update) / peak,
        "loop_samples_per_second": size / (rollout + update),
        "rollout_bytes": rollout_bytes,
        "learner_bytes": update_bytes,
        "peak_flops": peak,
    }


def report(
    options: argparse.Namespace,
    name: str,
    rows: list[dict[str, Any]],
    shares: dict[str, list[tuple[str, float]]],
) -> None:
    """Write what there is so far: a run that is cut off keeps the sizes before."""
    table = [
        "| batch | rollout of peak | learner of peak | loop of peak | rollout samples/s "
        "| loop samples/s | rollout GiB | learner GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        memory = [f"{row[key] / 2**30:.1f}" for key in ("rollout_bytes", "learner_bytes")]
        table.append(
            f"| {row['size']} | {row['rollout']:.1%} | {row['learner']:.1%} | {row['loop']:.1%} "
            f"| {row['rollout_samples_per_second']:.2f} | {row['loop_samples_per_second']:.2f} "
            f"| {' | '.join(memory)} |"
        )
    for phase, found in shares.items():
        table += ["", f"longest in the {phase}: "]
        table[-1] += ", ".join(f"{key} {share:.0%}" for key, share in found)
    device_name = torch.cuda.get_device_name() if name == "cuda" else "cpu"
    called = options.title or options.size
    title = "utilisation" + ("" if called == "shapes" else f"-{called}")
    write(title, {"device": device_name, "rows": rows, "longest": shares}, table)


def _config(options: argparse.Namespace, folder: Path, size: int) -> Config:
    overrides = ["diffusion.guidance_scale=5", "objective.timestep_choice=random"]
    if options.size != "shapes":
        path = options.pipeline or folder / "pipeline"
        if not path.exists():
            make_pipeline(path, options.size)
        dtype = _DTYPES.get(options.size, "float32")
        overrides += [f"model.path={path}", f"model.dtype={dtype}", "objective.decoupled=never"]
        overrides += ["diffusion.steps=10"]  # of SD's 50: a step costs the same whichever it is
        overrides += ["objective.trust=clip"]  # a mask by KL needs exact means
        if options.size in ("sd35", "tiny-flow"):
            side = 512 if options.size == "sd35" else 64
            overrides += [
                "diffusion.process=flow", "diffusion.window={}", f"diffusion.height={side}",
                f"diffusion.width={side}", "diffusion.guidance_scale=1",
                "learner.gradient_checkpointing=true",
            ]  # fmt: skip
    return load_config(
        ROOT / "configs" / "shapes.yaml",
        [
            *overrides,
            "objective.kl_weight=0",  # the reference's pass is not among the FLOPs that are counted
            "prompts.per_iteration=1",
            f"prompts.samples_per_prompt={size}",
            f"rollout.batch_size={size}",
            f"learner.microbatch_size={size}",
            "update.minibatches=1",
            *options.overrides,
        ],
    )


if __name__ == "__main__":
    main()
