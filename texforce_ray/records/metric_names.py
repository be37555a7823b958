"""The table of all metrics: what each of an iteration's numbers means, and its name for Prometheus.

`metrics.jsonl` and every tracker use the names of this table. Prometheus gets them with `/` as `_`
and with the part in braces as a label: `reward/shapes_mean` is `texforce_reward_mean` with
`reward="shapes"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

PREFIX = "texforce_"


class Metric(NamedTuple):
    """name: with the variable part in braces; family: other than the rule's, to tell two apart."""

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


# Plain names before patterns: the first one that fits counts.
METRICS = (
    Metric("policy_version", "policy version that drew the samples"),
    Metric("staleness", "versions between the policy that drew the samples and the trained one"),
    Metric("samples_per_second", "samples of the iteration by its time"),
    Metric("reward/total_mean", "mean weighted reward"),
    Metric("reward/total_std", "its standard deviation"),
    Metric(
        "reward/masked", "samples left out because a reward failed on them", "reward/masked_samples"
    ),
    Metric("advantage/mean", "mean advantage"),
    Metric("advantage/std", "its standard deviation"),
    Metric("advantage/abs_max", "largest absolute advantage; advantage.clip where it is clipped"),
    Metric("ppo/loss", "PPO's loss, mean over trained pairs of sample and timestep"),
    Metric("ppo/approx_kl", "estimated KL between the policy before and after, mean over pairs"),
    Metric("ppo/clipfrac", "share of pairs whose ratio was clipped"),
    Metric("ppo/ratio", "mean probability ratio"),
    Metric("ppo/kl_base", "KL to the base policy, with ppo.kl_weight"),
    Metric("ppo/trained_pairs", "pairs of sample and timestep that were trained on"),
    Metric(
        "ppo/ratio_error_first_pass",
        "largest abs(ratio - 1) before the first update; near 0 in float32",
    ),
    Metric("ppo/updates_left_out", "updates left out because of ppo.target_kl"),
    Metric("direct/reward", "mean differentiable reward in the update, with `direct`"),
    Metric("direct/reward_std", "its standard deviation"),
    Metric("learner/grad_norm", "mean norm of the gradient before it is clipped"),
    Metric("learner/skipped", "updates left out because their gradient was not finite"),
    Metric(
        "learner/effect",
        "relative change of a probe prompt's embedding against the base model; 0: no effect",
    ),
    Metric(
        "learner/gradient_agreement",
        "in half precision, before the first update: cosine of a gradient to that in float32",
    ),
    Metric("learner/gradient_zeros", "share of that gradient's entries that were lost to zero"),
    Metric("learner/lr", "learning rate of the last update"),
    Metric("learner/updates", "updates so far"),
    Metric("eval/diversity", "difference between images of one prompt in the evaluation"),
    Metric("eval/style_drift", "the same for colours, edges and textures, wherever they are"),
    Metric("eval/drift", "difference from the base model's images of the same prompts and seeds"),
    Metric("prompts/truncated", "prompts that are longer than the text encoder's limit"),
    Metric("actors/restarts", "failures of actors after which work was tried again, so far"),
    Metric("share/learner_wait", "share of the time in which the learner waited"),
    Metric("seconds/checkpoint_before", "seconds that the last checkpoint took"),
    Metric("work/rollout", "seconds of work of all rollout actors"),
    Metric("work/learner", "seconds of work of the learner"),
    Metric("work/learner_fetch", "seconds of those in which it fetched trajectories"),
    Metric("object_store/trajectory_bytes", "bytes of the iteration's trajectories"),
    Metric("object_store/image_bytes", "bytes of the iteration's images"),
    Metric("flops/rollout", "floating-point operations of the model in sampling"),
    Metric("flops/learner", "floating-point operations of the model in the update"),
    Metric("mfu/rollout", "those by what the rollouts' devices could have done at their peak"),
    Metric("mfu/learner", "those by what the learners' devices could have done at their peak"),
    Metric("reward/{reward}_mean", "mean raw score of one reward"),
    Metric("reward/{reward}_std", "its standard deviation"),
    Metric("reward/{reward}_masked", "samples that this reward could not score"),
    Metric("reward/{reward}_gated", "samples under this reward's gate (`min`)"),
    Metric("reward/{reward}_correlation", "with the total: near 0, this reward is drowned"),
    Metric("eval/base_{reward}", "evaluation score of the base model; `total` is the weighted sum"),
    Metric("eval/{reward}", "evaluation score; `total` is the weighted sum"),
    Metric("seconds/{phase}", "seconds of the driver's phases; `total` is their sum"),
    Metric("share/{phase}", "the same as shares of the iteration's time"),
    Metric("work/reward_{reward}", "seconds of work of one reward's servers"),
    Metric("scoring/{reward}_queue_max", "most calls that waited for a server of this reward"),
    Metric("scoring/{reward}_retries", "calls of this reward that were tried again"),
    Metric("scoring/{reward}_latency_p50", "median seconds from asking for scores to having them"),
    Metric("scoring/{reward}_latency_p95", "the same for the slowest twentieth"),
)

# What Prometheus gets besides, every few seconds while the run is on: meaning and labels.
LIVE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "texforce_version": ("newest policy version; the iterations that are finished", ()),
    "texforce_iterations_planned": ("iterations of the whole run", ()),
    "texforce_actors": (
        "actors that are busy, idle, starting (or waiting for room) or gone for good",
        ("role", "state"),
    ),
    "texforce_queue_length": (
        "units of work that wait for a free actor of the role; 'unscored': units that are being "
        "sampled or scored; 'admission': units that wait until there are fewer of those",
        ("role",),
    ),
    "texforce_restarts": (
        "failures of the role's actors after which work was tried again",
        ("role",),
    ),
    "texforce_seconds_since_result": ("seconds since any actor finished a task", ()),
    "texforce_samples_total": ("samples so far of this driver's process", ()),
}


@lru_cache(maxsize=1024)
def describe(name: str) -> tuple[Metric, dict[str, str]]:
    """A metric's entry in the table and its labels; one of its own for a name that is not there."""
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
