"""Ours against the released trainer's order of work: the same gradients, in less time.

    python benchmarks/released.py [--samples 64] [--rounds 2] [--size shapes|tiny|sd15]
                                  [--device auto] [--no-ray] [key.sub=value ...]

(a) the released schedule (`released_schedule.py`), (b) the plain classes in one process, (c) the
whole system with two rollout actors and two learners of half the threads each. All in one run: (a)
and (b) take turns in one process, with the allocator set as in an actor, which helps (a) too.
`model.compile=true` compiles (b) alone.

Utilisation is model FLOPs over this run's best matrix product: of a sample, all passes of its
rollout, its decoder, and a pass there and back through the U-Net for each trained timestep. What a
schedule computes beyond that counts against it. Writes benchmarks/results/released.json and .md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import ROOT, Clock, as_in_an_actor, medians, write
from released_schedule import ReleasedSchedule
from torch import Tensor

from texforce_ray.config import Config
from texforce_ray.config.io import load_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.diffusion.trajectory import concatenate
from texforce_ray.model.backbone import load_backbone
from texforce_ray.model.flops import matmul_peak, pair_flops, sample_flops
from texforce_ray.records.metrics import read_metrics
from texforce_ray.rewards import arguments, resolve
from texforce_ray.rewards.base import load_reward
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.sharding import UpdateBatch

SETTINGS = (
    "diffusion.guidance_scale=5",
    "objective.timestep_choice=random",
    "objective.trust=clip",
    "objective.clip_range=1e-3",
    "objective.kl_weight=0",  # the released trainer has no KL, and neither has its schedule here
    "prompts.per_iteration=4",
    "prompts.samples_per_prompt=16",
    "lora.text_encoder.rank=16",
    "lora.text_encoder.alpha=16",
)
FULL = (
    "diffusion.steps=50",
    "model.dtype=float16",
    "objective.decoupled=never",
    "rollout.batch_size=16",
    "learner.microbatch_size=16",
)
TINY = ("diffusion.steps=4", "rollout.batch_size=8")
PROMPTS = ("a green circle", "three red squares", "a red circle and a blue square", "a red circle")
ALIKE = 1e-4  # largest difference of gradients in float32, relative to the largest entry
PHASES = ("rollout", "reward", "learner")


class Plain:
    """An iteration of each schedule, on one learner."""

    def __init__(self, config: Config, device: str) -> None:
        self.config = config
        self.memory: dict[str, dict[str, int]] = {}
        # As actors set it: TF32's ten bits would make the two ways' gradients differ.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        backbone = load_backbone(config.model.path, dtype=config.model.dtype, device=device)
        if config.model.compile:  # ours alone
            backbone.compile()
        self.backbone = backbone
        self.learner = PpoLearner(backbone, config)
        self.released = ReleasedSchedule(self.learner)
        reward = config.rewards[0]
        self.sampler = Sampler.of(backbone, config)
        self.reward = load_reward(
            resolve(reward.name, reward.target), arguments(reward.name, reward.kwargs)
        )
        count = config.samples_per_iteration
        self.prompts = [PROMPTS[i * len(PROMPTS) // count] for i in range(count)]
        self.seeds = np.arange(count)
        rng = np.random.default_rng(0)
        self.advantages = rng.standard_normal(count)
        # With B = 0, half of the gradient would be 0: a policy some way from the base.
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.learner.parameters:
                p.copy_((torch.randn(p.shape, generator=noise) * 0.02).to(p.device))
        self.state = self.learner.learned()

    def ours(self) -> dict[str, float]:
        """Seconds of each phase of our iteration."""
        clock, size = Clock(self.backbone.device), self.config.rollout.batch_size
        drawn = [
            self.sampler.sample(self.prompts[i : i + size], self.seeds[i : i + size], 0)
            for i in range(0, len(self.prompts), size)
        ]
        clock.stop("rollout")
        for trajectory, images in drawn:
            self.reward.score(images, list(trajectory.prompts), [{}] * len(images))
        clock.stop("reward")
        self.learner.update(self._batch([trajectory for trajectory, _ in drawn]))
        clock.stop("learner")
        self.learner.load(self.state)
        self.memory["ours"] = clock.peak_bytes
        return clock.seconds

    def baseline(self) -> dict[str, float]:
        """Seconds of each phase of the released schedule."""
        clock = Clock(self.backbone.device)
        with self.backbone.eager():
            trajectory, images = self.released.sample(self.prompts, self.seeds)
            clock.stop("rollout")
            for image, prompt in zip(images, self.prompts, strict=True):
                self.reward.score(image[None], [prompt], [{}])
            clock.stop("reward")
            self.released.update(self._batch([trajectory]))
        clock.stop("learner")
        self.learner.load(self.state)
        self.memory["released"] = clock.peak_bytes
        return clock.seconds

    def gradient_difference(self) -> float:
        """Largest difference of the first minibatch's gradients, relative to the largest entry."""
        with self.backbone.eager():
            first, _ = self.released.sample(self.prompts, self.seeds)
        batch = self._batch([first])
        steps = np.tile(np.array(self.learner.process.trainable[:2]), (len(self.prompts), 1))
        rows = self.learner._minibatches(batch, 0)[0]
        with self.backbone.eager():
            theirs = self.released.gradient(batch, rows, steps)
        ours = self._our_gradient(batch, rows, steps)
        largest = max(float(t.abs().max()) for t in theirs)
        pairs = zip(ours, theirs, strict=True)
        return max(float((one - other).abs().max()) for one, other in pairs) / largest

    def _our_gradient(
        self, batch: UpdateBatch, rows: np.ndarray, steps: np.ndarray
    ) -> list[Tensor]:
        from texforce_ray.rl.ppo_anchor import Anchor
        from texforce_ray.rl.ppo_totals import Totals

        anchor, totals = Anchor.of(batch.trajectory.log_probs), [Totals(self.backbone.device)]
        return self.learner._minibatch_gradient(batch, rows, steps, anchor, totals)

    def _batch(self, parts: list) -> UpdateBatch:
        mask = np.ones(len(self.prompts), dtype=bool)
        return UpdateBatch(concatenate(parts), self.advantages, mask)


def through_ray(config: Config, iterations: int) -> dict[str, float]:
    """Median seconds of the whole system's iterations, after the first."""
    from texforce_ray import train  # with Ray, which a machine for --no-ray need not have

    with tempfile.TemporaryDirectory() as folder:
        run_dir = str(Path(folder) / "run")
        train(config.model_copy(update={"run_dir": run_dir, "iterations": iterations}))
        lines = read_metrics(Path(run_dir))[1:]
    return {
        "rollout": median(m["seconds/rollout_wait"] for m in lines),
        "learner": median(m["seconds/update"] for m in lines),
        "total": median(m["seconds/total"] for m in lines),
    }


NAMES = {
    "released": "released schedule",
    "ours": "ours, plain classes",
    "system": "ours, whole system (2 + 2 actors)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, help="of the plain classes; default 64 (tiny: 16)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", choices=("shapes", "tiny", "sd15"), default="shapes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    as_in_an_actor()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        plain = Plain(_config(options, Path(folder)), options.device)
        difference = plain.gradient_difference()
        if plain.backbone.dtype == torch.float32 and difference > ALIKE:
            sys.exit(f"not the same work: gradients differ by {difference:.0e} of the largest")
        rates, peak = _measure(plain, options, threads)
    flops = sum(_flops(plain).values())
    table = [
        *_table(rates, flops, peak),
        "",
        f"{flops / 1e9:.2f} GFLOP a sample; matrix product {peak / 1e9:.0f} GFLOP/s "
        f"({plain.backbone.dtype}, {threads} threads, {options.device}); gradients differ by "
        f"{difference:.0e} of the largest",
    ]
    result = {
        "size": options.size,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": threads,
        "samples_per_second": rates,
        "ratio": {name: rate["total"] / rates["released"]["total"] for name, rate in rates.items()},
        "utilisation": {name: rate["total"] * flops / peak for name, rate in rates.items()},
        "phase_utilisation": {
            phase: rates["ours"][phase] * cost / peak for phase, cost in _flops(plain).items()
        },
        "gradient_difference": difference,
        "flops_per_sample": flops,
        "peak_flops": peak,
        "peak_bytes": plain.memory,
    }
    # A trial at another size leaves the results that the documentation shows.
    write("released" if options.size == "shapes" else f"released-{options.size}", result, table)


def _measure(
    plain: Plain, options: argparse.Namespace, threads: int
) -> tuple[dict[str, dict[str, float]], float]:
    """Samples/s of each way, in total and by phase; the best matrix product in FLOP/s."""
    peak = partial(matmul_peak, plain.backbone.device, plain.backbone.dtype)
    peaks = [peak()]
    seconds = medians(options.rounds, {"released": plain.baseline, "ours": plain.ours})
    peaks.append(peak())
    rates = {
        name: {"total": len(plain.prompts) / sum(s.values())}
        | {phase: len(plain.prompts) / s[phase] for phase in PHASES}
        for name, s in seconds.items()
    }
    if not options.no_ray and options.device == "cpu" and options.size == "shapes":
        whole = _system_config(options, threads)
        took = through_ray(whole, iterations=4)
        rates["system"] = {
            phase: whole.samples_per_iteration / value for phase, value in took.items()
        }
        peaks.append(peak())
    return rates, max(peaks)


def _table(rates: dict[str, dict[str, float]], flops: float, peak: float) -> list[str]:
    table = [
        "| | samples/s | over released | rollout | reward | learner | share of matmul peak |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = rates["released"]
    for name, rate in rates.items():
        phases = [
            f"x {rate[phase] / base[phase]:.2f}" if phase in rate else "beside" for phase in PHASES
        ]
        table.append(
            f"| {NAMES[name]} | {rate['total']:.2f} | x {rate['total'] / base['total']:.2f} | "
            f"{' | '.join(phases)} | {rate['total'] * flops / peak:.1%} |"
        )
    return table


def _flops(plain: Plain) -> dict[str, float]:
    """Of a sample, by phase."""
    config, d = plain.config, plain.config.diffusion
    learner = config.trained_timesteps * pair_flops(plain.backbone, d.guidance_scale)
    return {
        "rollout": sample_flops(plain.backbone, d.steps, d.guidance_scale),
        "learner": learner,
    }


def _config(options: argparse.Namespace, folder: Path) -> Config:
    overrides = [*SETTINGS, *options.overrides]
    if options.size != "shapes":
        from full_size import make_pipeline

        make_pipeline(folder, options.size)
        overrides = [*SETTINGS, *(FULL if options.size == "sd15" else TINY), *options.overrides]
        overrides.append(f"model.path={folder}")
        # The detector of shapes would need longer for a large image than a GPU does to draw it.
        overrides.append("rewards=[{name: jpeg_compressibility}]")
    samples = options.samples or (16 if options.size == "tiny" else 64)
    overrides.append(f"prompts.samples_per_prompt={samples // 4}")
    if options.size != "sd15" and samples < 32:
        overrides.append(f"rollout.batch_size={samples // 2}")
    return load_config(ROOT / "configs" / "shapes.yaml", overrides)


def _system_config(options: argparse.Namespace, threads: int) -> Config:
    """Two rollout actors, then two learners, with half of the threads each."""
    each = max(1, threads // 2)
    return load_config(
        ROOT / "configs" / "shapes.yaml",
        [
            *SETTINGS,
            "prompts.samples_per_prompt=64",
            "rollout.num_workers=2",
            f"rollout.num_threads={each}",
            "rollout.num_cpus=0.5",
            "learner.num_workers=2",
            "learner.gradient_shards=2",
            f"learner.num_threads={each}",
            "learner.num_cpus=0.25",
            "eval.every=0",
            "eval.final_images=0",
            *options.overrides,
        ],
    )


if __name__ == "__main__":
    main()
