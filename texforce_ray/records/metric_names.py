"""The table of all metrics: what each of an iteration's numbers means, and its Prometheus name.

`metrics.jsonl` and every tracker use the names in this table. In Prometheus, `/` becomes `_` and
the part in braces becomes a label: `reward/shapes_mean` is `texforce_reward_mean` with
`reward="shapes"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

PREFIX = "texforce_"


class Metric(NamedTuple):
    """name: with the variable part in braces; family: overrides the rule where two would clash."""

    name: str
    meaning: str
    family: str | None = None

    @property
    def prometheus(self) -> str:
        """The family's name, e.g. `texforce_reward_mean`."""
        plain = re.sub(r"[^a-zA-Z0-9]+", "_", re.sub(r"\{\w+\}", "", self.family or self.name))
        return PREFIX + plain.strip("_")

    @property
    def label(self) -> str | None:
        found = re.search(r"\{(\w+)\}", self.name)
        return found[1] if found else None


# Plain names before patterns: the first match wins.
METRICS = (
    Metric("policy_version", "policy version that drew the samples"),
    Metric("staleness", "versions between the policy that drew the samples and the trained one"),
    Metric("samples_per_second", "samples of the iteration divided by its time"),
    Metric("reward/total_mean", "mean weighted reward"),
    Metric("reward/total_std", "its standard deviation"),
    Metric(
        "reward/masked", "samples left out because a reward failed on them", "reward/masked_samples"
    ),
    Metric("advantage/mean", "mean advantage"),
    Metric("advantage/std", "its standard deviation"),
    Metric("advantage/abs_max", "largest absolute advantage; at most advantage.clip"),
    Metric("ppo/loss", "PPO's loss, mean over trained pairs of sample and timestep"),
    Metric("ppo/approx_kl", "estimated KL between the policy before and after, mean over pairs"),
    Metric(
        "ppo/clipfrac",
        "share of pairs whose ratio was clipped, or that objective.trust `kl_mask` left out",
    ),
    Metric("ppo/ratio", "mean probability ratio"),
    Metric("ppo/kl_base", "KL to the base policy, with objective.kl_weight"),
    Metric("ppo/trained_pairs", "pairs of sample and timestep that were trained on"),
    Metric(
        "ppo/ratio_error_first_pass",
        "largest abs(ratio - 1) before the first update; near 0 in float32",
    ),
    Metric("ppo/updates_left_out", "updates left out because of objective.target_kl"),
    Metric("direct/reward", "mean differentiable reward, with objective.kind `direct`"),
    Metric("direct/reward_std", "its standard deviation"),
    Metric("direct/trained_images", "images that were trained on, counted in every epoch"),
    Metric("direct/trained_pairs", "those images times their steps with gradient"),
    Metric(
        "forward/error",
        "mean square of output - target, mean over trained pairs of sample and level; with "
        "objective.kind `nft`, `awm`, `rwr` or `raft`",
    ),
    Metric("forward/loss", "the objective's loss without anchors, mean over these pairs"),
    Metric(
        "forward/anchor",
        "mean squared difference from the base policy's output, with objective.anchor_weight",
    ),
    Metric(
        "forward/embedding_anchor",
        "likewise of the prompts' embeddings, with objective.embedding_anchor_weight",
    ),
    Metric("forward/ratio", "with `awm`, mean of exp(error before the update - error)"),
    Metric("forward/clipfrac", "with `awm`, share of pairs whose ratio is beyond clip_range"),
    Metric(
        "forward/trained_pairs",
        "pairs of sample and level that were trained on",
    ),
    Metric(
        "forward/old_decay",
        "with `nft`, d of old = d old + (1 - d) trained after the iteration; 0: the trained policy "
        "samples",
    ),
    Metric("learner/grad_norm", "mean norm of the gradient before it is clipped"),
    Metric("learner/skipped", "updates left out because their gradient was not finite"),
    Metric(
        "learner/effect",
        "relative change of a probe prompt's embedding against the base model; 0: no effect",
    ),
    Metric(
        "learner/gradient_agreement",
        "in half precision, before the first update: cosine between a gradient and its float32 one",
    ),
    Metric("learner/gradient_zeros", "share of that gradient's entries that underflowed to zero"),
    Metric("learner/lr", "learning rate of the last update"),
    Metric("learner/updates", "updates so far"),
    Metric("eval/diversity", "difference between images of one prompt in the evaluation"),
    Metric(
        "eval/style_drift",
        "like `eval/drift`, but of colours, edges and textures, wherever they are",
    ),
    Metric("eval/drift", "difference from the base model's images of the same prompts and seeds"),
    Metric(
        "eval/high_frequency",
        "share of the luminance's power above half the Nyquist frequency, mean over images",
    ),
    Metric(
        "eval/grid",
        "contrast of periodic patterns of at most 16 pixels (checkerboards, grids): root mean "
        "square of the luminance, 0 to 1, mean over images",
    ),
    Metric("eval/base_high_frequency", "the same of the base model, same prompts and seeds"),
    Metric("eval/base_grid", "likewise"),
    Metric("prompts/truncated", "prompts that are longer than the text encoder's limit"),
    Metric("actors/restarts", "actor failures after which work was retried, so far"),
    Metric("share/learner_wait", "share of the time that the learner spent waiting"),
    Metric("seconds/checkpoint_before", "seconds that the last checkpoint took"),
    Metric("work/rollout", "seconds of work of all rollout actors"),
    Metric("work/learner", "seconds of work of the learner"),
    Metric("work/learner_fetch", "seconds of those spent fetching trajectories"),
    Metric("object_store/trajectory_bytes", "bytes of the iteration's trajectories"),
    Metric("object_store/image_bytes", "bytes of the iteration's images"),
    Metric("flops/rollout", "floating-point operations of the model in sampling"),
    Metric("flops/learner", "floating-point operations of the model in the update"),
    Metric("mfu/rollout", "`flops/rollout` divided by the peak of the rollouts' devices"),
    Metric("mfu/learner", "`flops/learner` divided by the peak of the learners' devices"),
    Metric("reward/{reward}_mean", "mean raw score of one reward"),
    Metric("reward/{reward}_std", "its standard deviation"),
    Metric("reward/{reward}_masked", "samples that this reward could not score"),
    Metric("reward/{reward}_gated", "samples below this reward's gate (`min`)"),
    Metric(
        "reward/{reward}_correlation",
        "correlation with the total; near 0: the others drown it out",
    ),
    Metric("eval/base_{reward}", "evaluation score of the base model; `total` is the weighted sum"),
    Metric("eval/{reward}", "evaluation score; `total` is the weighted sum"),
    Metric("seconds/{phase}", "seconds of the driver's phases; `total` is their sum"),
    Metric("share/{phase}", "the same as shares of the iteration's time"),
    Metric("work/reward_{reward}", "seconds of work of one reward's servers"),
    Metric("scoring/{reward}_queue_max", "most calls waiting at once for this reward's servers"),
    Metric("scoring/{reward}_retries", "calls of this reward that were retried"),
    Metric("scoring/{reward}_latency_p50", "median seconds from requesting scores to getting them"),
    Metric("scoring/{reward}_latency_p95", "the same at the 95th percentile"),
)

# Sent to Prometheus only, every few seconds during the run: meaning and labels.
LIVE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "texforce_version": ("newest policy version; equals the number of finished iterations", ()),
    "texforce_iterations_planned": ("iterations of the whole run", ()),
    "texforce_actors": (
        "actors that are busy, idle, starting (or waiting for room) or gone for good",
        ("role", "state"),
    ),
    "texforce_queue_length": (
        "units of work waiting for a free actor of the role; 'unscored': units being sampled or "
        "scored; 'admission': units waiting until there are fewer of those",
        ("role",),
    ),
    "texforce_restarts": ("failures of the role's actors after which work was retried", ("role",)),
    "texforce_seconds_since_result": ("seconds since any actor finished a task", ()),
    "texforce_samples_total": ("samples so far in this driver process", ()),
}


@lru_cache(maxsize=1024)
def describe(name: str) -> tuple[Metric, dict[str, str]]:
    """A metric's table entry and its labels; an unknown name gets an entry of its own."""
    for metric in METRICS:
        if found := _pattern(metric.name).fullmatch(name):
            return metric, found.groupdict()
    return Metric(name, "see metrics.jsonl"), {}


@lru_cache(maxsize=256)
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(name)))


def markdown() -> str:
    """The table of docs/observability.md."""
    rows = ["| name | meaning | Prometheus |", "| --- | --- | --- |"]
    for metric in METRICS:
        label = f"{{{metric.label}}}" if metric.label else ""
        rows.append(f"| `{metric.name}` | {metric.meaning} | `ray_{metric.prometheus}{label}` |")
    rows += ["", "| live, Prometheus only | meaning |", "| --- | --- |"]
    for name, (meaning, labels) in LIVE.items():
        rows.append(f"| `ray_{name}{{{', '.join(labels)}}}` | {meaning} |".replace("{}", ""))
    return "\n".join(rows) + "\n"
