"""What an update optimises, how it is split, and the optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from texforce_ray.config.fields import Section, free, recorded

_Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class PpoObjective(Section):
    """PPO on the likelihood of sampled trajectories; the reward needs no gradient."""

    kind: Literal["ppo"] = Field("ppo", description="which objective")
    clip_range: float = Field(1e-4, gt=0, lt=1, description="lambda; r is clipped to 1 +- lambda")
    timestep_fraction: float = Field(0.5, gt=0, le=1, description="share of timesteps trained")
    timestep_choice: Literal["random", "first"] = Field(
        "random",
        description="'random': drawn for each sample (the paper); 'first': the noisiest ones, "
        "which decide what is in the image. With few denoising steps the last ones have a small "
        "sigma, and their likelihood drowns the others' gradient in noise",
    )
    level: Literal["none", "guard", "tempflow"] = Field(
        "none",
        description="make timesteps count alike: 'guard': ratios that do not depend on a step's "
        "noise, losses divided by what the step makes of the network's output (GRPO-Guard); "
        "'tempflow': losses weighted by the step's noise (TempFlow-GRPO)",
    )
    trust: Literal["clip", "kl_mask"] = Field(
        "clip",
        description="'clip': the ratio; 'kl_mask': leave out pairs whose KL to the sampling policy "
        "has reached trust_kl and whose ratio has already moved the advantage's way (Flow-DPPO)",
    )
    trust_kl: float = Field(
        1e-5, gt=0, description="of trust 'kl_mask', averaged over latent dimensions"
    )
    kl_weight: float = recorded(
        0.0,
        "weight of the KL to the base policy, averaged over latent dimensions like "
        "log-probabilities",
        ge=0,
    )
    target_kl: float | None = recorded(
        None,
        "an iteration's updates end early at a minibatch whose approx_kl exceeds this",
        gt=0,
    )
    decoupled: Literal["auto", "always", "never"] = Field(
        "auto",
        description="clip against log-probabilities recomputed by the learner; 'auto': when "
        "max_staleness > 0 or not all numbers are float32",
    )
    behaviour_cap: float = Field(
        2.0, gt=0, description="c, cap of the weight pi_prox / pi_behaviour"
    )
    max_ratio_error: float | None = free(
        None,
        "the run fails if |r - 1| exceeds this on an iteration's first minibatch, before the first "
        "update; default: 1e-4 in float32, no bound otherwise",
        gt=0,
        allow_inf_nan=True,
    )

    @property
    def needs_means(self) -> bool:
        """Whether the loss compares means of steps, not only their log-probabilities."""
        return self.level == "guard" or self.trust == "kl_mask"


class DirectObjective(Section):
    """Backpropagation of differentiable rewards through the last steps."""

    kind: Literal["direct"] = Field("direct", description="which objective")
    method: Literal["refl", "draft", "alignprop"] = Field(
        "refl",
        description="'refl': jump from a late step to the image; 'draft': denoise the last steps "
        "with gradient; 'alignprop': like draft, but each update draws how many of them",
    )
    steps: int = Field(
        1,
        ge=1,
        description="K: 'draft' uses the last K steps; for the others, each update draws 1 to K",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute the U-Net's activations instead of keeping them"
    )


class ForwardObjective(Section):
    """On the forward process: finished samples are noised again, and the policy denoises them."""

    levels: int = Field(
        4, ge=1, description="noise levels of the process at which each sample is trained"
    )
    anchor_weight: float = recorded(
        0.0, "weight of the squared difference between the policy's output and the base's", ge=0
    )
    embedding_anchor_weight: float = recorded(
        0.0,
        "weight of the squared difference between the prompts' embeddings and the base's; costs no "
        "pass through the U-Net",
        ge=0,
    )


class NftObjective(ForwardObjective):
    """DiffusionNFT (Zheng et al. 2025): towards good samples and away from bad ones."""

    kind: Literal["nft"] = Field("nft", description="which objective")
    beta: float = Field(
        1.0, gt=0, description="how far the implicit good and bad policies are from the old one"
    )
    advantage_max: float = Field(
        5.0, gt=0, description="A_max: an advantage of this counts as entirely good"
    )
    old_rate: float = Field(
        0.001, ge=0, description="the old policy's decay grows by this in each iteration"
    )
    old_decay_max: float = Field(0.5, ge=0, lt=1, description="up to this")
    old_start: int = Field(
        0, ge=0, description="iterations before it grows; until then the newest policy samples"
    )


class RwrObjective(ForwardObjective):
    """Reward-weighted regression (Lee et al. 2023); the reward needs no gradient."""

    kind: Literal["rwr"] = Field("rwr", description="which objective")
    temperature: float = Field(
        1.0, gt=0, description="tau: a sample's weight is exp(advantage / tau), 1 on average"
    )


class RaftObjective(ForwardObjective):
    """Regression on the best samples of each prompt (Dong et al. 2023)."""

    kind: Literal["raft"] = Field("raft", description="which objective")
    best: int = Field(1, ge=1, description="samples of each prompt that count, the best ones")


class AwmObjective(ForwardObjective):
    """Advantage-weighted matching (Xue et al. 2025): PPO whose log-probability is -error."""

    kind: Literal["awm"] = Field("awm", description="which objective")
    clip_range: float = Field(1e-3, gt=0, lt=1, description="r is clipped to 1 +- this")


class CustomObjective(Section):
    """An objective of your own: docs/extending.md."""

    kind: Literal["custom"] = Field("custom", description="which objective")
    target: str = Field(
        description="your subclass of texforce_ray.rl.learner.Learner: 'package.module:Class'",
        pattern=r"^[\w.]+:\w+$",
    )
    kwargs: dict[str, Any] = Field({}, description="its arguments, as config.objective.kwargs")


def _kind(value: Any) -> Any:
    """PPO by default."""
    return {"kind": "ppo"} | value if isinstance(value, dict) else value


Objective: TypeAlias = Annotated[
    Annotated[
        PpoObjective
        | DirectObjective
        | NftObjective
        | AwmObjective
        | RwrObjective
        | RaftObjective
        | CustomObjective,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_kind),
]


class UpdateConfig(Section):
    """How an iteration's samples become optimizer updates, whatever the objective."""

    epochs: int = Field(1, ge=1, description="passes over the iteration's samples")
    minibatches: int = Field(4, ge=1, description="optimizer updates in one epoch")
    max_skipped: int = free(
        3,
        "updates in a row that may be skipped because their gradient is not finite; one more "
        "stops the run",
        ge=0,
    )


class OptimizerConfig(Section):
    """AdamW on the adapter."""

    lr: float = recorded(3e-4, "peak learning rate", gt=0)
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.999), description="Adam's decay rates")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="share of updates in warm-up")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="exponential average of the adapter, used for evaluation"
    )
