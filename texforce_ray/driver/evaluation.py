"""Evaluation of policies on the same prompts and seeds, and their paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from texforce_ray import randomness
from texforce_ray.cluster.answers import gather
from texforce_ray.driver.collect import check_masked, is_scored, score
from texforce_ray.files import atomic_write_bytes, atomic_write_text, to_json
from texforce_ray.prompts import Prompt, prompts_of_iteration
from texforce_ray.records.images import comparison, save_png
from texforce_ray.records.intervals import bootstrap_interval
from texforce_ray.records.looks import Looks
from texforce_ray.records.samples import to_parquet
from texforce_ray.rl.advantage import Component, combine

if TYPE_CHECKING:
    from ray import ObjectRef

    from texforce_ray.crew.crew import Crew


@dataclass(frozen=True)
class Evaluation:
    """N images of one policy.

    rewards: float64 [N, R], raw; total: float64 [N], weighted sum without normalisation, NaN where
    a component of it is; shown: uint8 [G, H, W, 3], the first images; looks: of all images.
    """

    prompts: tuple[str, ...]
    seeds: np.ndarray
    rewards: np.ndarray
    total: np.ndarray
    shown: np.ndarray
    looks: Looks

    def means(self, names: Sequence[str]) -> dict[str, float]:
        """Mean of each reward and of the total, over what could be scored."""
        columns = dict(zip(names, self.rewards.T, strict=True)) | {"total": self.total}
        return {name: _mean(values) for name, values in columns.items()}


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


async def evaluate(
    crew: Crew,
    prompts: list[Prompt],
    count: int,
    policy: Sequence[ObjectRef],
    keep: int | None = None,
    guidance_scale: float | None = None,
) -> Evaluation:
    """Draw and score `count` images: the same prompts and seeds for every policy.

    Args:
        crew: rollout actors and reward servers.
        prompts: taken in an order fixed by `eval.seed`, starting over when used up.
        count: images.
        policy: one snapshot ref; empty for the base model.
        keep: images to keep at full size; default: `eval.grid`.
        guidance_scale: default: `eval.guidance_scale`, or else that of training.

    Raises:
        RewardError: too many images could not be scored.
    """
    config = crew.config
    chosen = prompts_of_iteration(prompts, config.eval.seed, 0, count)
    seeds = randomness.noise_seeds(config.eval.seed, 0, count, randomness.EVALUATION)
    size = config.rollout.batch_size
    shown = min(keep or config.eval.grid, count)
    guidance = config.evaluation_guidance if guidance_scale is None else guidance_scale

    async def part(
        first: int,
    ) -> tuple[np.ndarray, dict[str, str], np.ndarray | None, Looks]:
        batch = chosen[first : first + size]
        texts = [p.text for p in batch]

        async def attempt() -> tuple[np.ndarray, dict[str, str], np.ndarray | None, Looks]:
            chunk = seeds[first : first + size]
            info, images = await crew.generate(texts, chunk, policy, guidance)
            rewards, errors, _ = await score(crew, images, texts, [p.metadata for p in batch])
            assert info.looks is not None
            visible = await crew.images(images) if first < shown else None
            return rewards, errors, visible, info.looks

        async with crew.backlog:
            return await crew.redo_if_lost(attempt)

    parts = await gather(*(part(first) for first in range(0, count, size)))
    rewards = np.concatenate([rewards for rewards, *_ in parts])
    errors = {key: error for _, part_errors, *_ in parts for key, error in part_errors.items()}
    check_masked(config, rewards, errors, "an evaluation")
    mask = is_scored(config, rewards)
    # Without normalisation, so that totals of different policies are comparable.
    components = [Component(r.weight, "none", r.min, r.floor) for r in config.rewards]
    total = combine(rewards, mask, components, never_raise=True)
    return Evaluation(
        prompts=tuple(p.text for p in chosen),
        seeds=seeds,
        rewards=rewards,
        total=np.where(mask, total, np.nan),
        shown=np.concatenate([seen for _, _, seen, _ in parts if seen is not None])[:shown],
        looks=Looks.joined([looks for *_, looks in parts]),
    )


def paired_difference(
    base: np.ndarray, tuned: np.ndarray, prompts: Sequence[str] | None = None, seed: int = 0
) -> dict[str, float]:
    """Mean difference of paired scores (float64 [N] each) with a 95 % bootstrap interval.

    Pairs in which either score is NaN are left out. With `prompts`, one per pair, the interval
    resamples prompts rather than images: see `records.intervals`.
    """
    known = ~(np.isnan(base) | np.isnan(tuned))
    base, tuned = base[known], tuned[known]
    texts = None if prompts is None else [prompts[i] for i in np.flatnonzero(known).tolist()]
    if not len(base):
        nothing = float("nan")
        keys = ("base", "tuned", "difference", "low", "high", "win_rate")
        return dict.fromkeys(keys, nothing) | {"images": 0}
    difference = tuned - base
    low, high = bootstrap_interval(difference, texts, seed)
    return {
        "base": float(base.mean()),
        "tuned": float(tuned.mean()),
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        # The share of seeds at which the tuned image is better; a tie is half a win.
        "win_rate": float(((difference > 0) + 0.5 * (difference == 0)).mean()),
        "images": len(difference),
    }


@dataclass(frozen=True)
class Comparison:
    """Base compared with tuned.

    rewards: a `paired_difference` for each reward and 'total'; unseen: the same on `eval.unseen`;
    guidance: that of the total at each of `eval.guidance_curve`, with the prompt set's name.
    """

    rewards: dict[str, dict[str, float]]
    unseen: dict[str, dict[str, float]]
    guidance: list[dict[str, Any]]


async def compare_over_guidance(
    crew: Crew, prompts: Mapping[str, list[Prompt]], policy: Sequence[ObjectRef]
) -> list[dict[str, Any]]:
    """Compare base and tuned at every scale of `eval.guidance_curve`, on each prompt set.

    Returns:
        For each: prompts, guidance_scale, and the `paired_difference` of the total.
    """
    count = crew.config.eval.curve_images
    places = [(name, scale) for name in prompts for scale in crew.config.eval.guidance_curve]
    found = await gather(
        *(
            evaluate(crew, prompts[name], count, kind, 1, scale)
            for name, scale in places
            for kind in ([], policy)
        )
    )
    return [
        {"prompts": name, "guidance_scale": scale}
        | paired_difference(base.total, tuned.total, base.prompts)
        for (name, scale), base, tuned in zip(places, found[::2], found[1::2], strict=True)
    ]


def compare(
    names: Sequence[str], base: Evaluation, tuned: Evaluation
) -> dict[str, dict[str, float]]:
    """Paired differences of every reward and of the total, by name."""
    columns = zip(names, base.rewards.T, tuned.rewards.T, strict=True)
    result = {name: paired_difference(b, t, base.prompts) for name, b, t in columns}
    return result | {"total": paired_difference(base.total, tuned.total, base.prompts)}


def write_results(
    folder: Path,
    summary: Mapping[str, Any],
    names: Sequence[str],
    results: Mapping[str, Evaluation],
    grid: int,
) -> None:
    """Write the results of policies, by label, on the same prompts and seeds.

    summary.json; samples.parquet, a row for each image; comparison.png, the first `grid` images.
    """
    first = next(iter(results.values()))
    columns: dict[str, Any] = {"prompt": list(first.prompts), "seed": first.seeds}
    for label, result in results.items():
        columns |= {f"{label}_{n}": v for n, v in zip(names, result.rewards.T, strict=True)}
        columns[f"{label}_total"] = result.total
    shown = min(grid, len(first.shown))
    rows = [(label, result.shown[:shown]) for label, result in results.items()]
    scores = [result.total[:shown].tolist() for result in results.values()]
    atomic_write_text(folder / "summary.json", to_json(summary, indent=2) + "\n")
    atomic_write_bytes(folder / "samples.parquet", to_parquet(columns))
    save_png(folder / "comparison.png", comparison(rows, first.prompts[:shown], scores=scores))
