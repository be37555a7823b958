"""The configuration: typed, closed, and checked before anything starts.

Every field says whether it affects the result. Fields made with `placement` say only where and
how things run: they may change on resume. All others must match. No torch, no Ray.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
DType: TypeAlias = Literal["float32", "float16", "bfloat16"]


def _auto(value: Any) -> Any:
    return 0 if value == "auto" else value


AutoSize: TypeAlias = Annotated[int, BeforeValidator(_auto)]  # 0: not yet resolved


def placement(default: Any, description: str, **constraints: Any) -> Any:
    """A field that does not affect the result and may differ when a run is resumed."""
    return Field(
        default, description=description, json_schema_extra={"placement": True}, **constraints
    )


def safe(default: Any, description: str, **constraints: Any) -> Any:
    """A field that affects the result, and may all the same be changed when a run is resumed.

    For runs that stopped because learning went wrong. The change is recorded with the run.
    """
    return Field(default, description=description, json_schema_extra={"safe": True}, **constraints)


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(_Section):
    """The base pipeline. Everything in it stays frozen; others' U-Nets can stand in its place."""

    path: str = Field(
        "embedded",
        description="'embedded' (the shapes world), a diffusers directory, a hub id, or one "
        ".safetensors file with single_file_config",
    )
    revision: str | None = Field(None, description="hub revision to pin")
    variant: str | None = Field(None, description="weight file variant, e.g. 'fp16'")
    dtype: DType = Field("float32", description="dtype of the frozen weights")
    unet: str | None = Field(
        None, description="directory or hub id of a whole U-Net to use instead of the pipeline's"
    )
    unet_adapters: tuple[str, ...] = Field(
        (),
        description="LoRAs of the U-Net that are merged into it and stay frozen, in any form that "
        "docs/adapters.md lists",
    )
    single_file_config: str | None = Field(
        None,
        description="where path is one .safetensors file: a diffusers directory of the same kind "
        "of model, whose configs and tokenizers are read",
    )
    compile: bool = Field(
        False,
        description="torch.compile the U-Net: faster after a minute or more at the first batch of "
        "each shape",
    )
    device: str = placement("auto", "'auto' (cuda if the actor was given a GPU), 'cpu', 'cuda'")


class UnetLoraConfig(_Section):
    """An adapter on the U-Net, trained instead of the text encoder's or jointly with it."""

    rank: int = Field(4, ge=1, description="rank of every LoRA pair")
    alpha: float = Field(4.0, gt=0, description="scale; the update is alpha / rank * B A")
    target_modules: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="names of the U-Net's linear layers that get an adapter",
    )
    lr: float | None = safe(None, "peak learning rate; default: optimizer.lr", gt=0)


class LoraConfig(_Section):
    """The trained adapters: on the text encoder, as in TexForce, on the U-Net, or on both."""

    text_encoder: bool = Field(True, description="train the text encoder; false: U-Net alone")
    rank: int = Field(16, ge=1, description="rank of every LoRA pair")
    alpha: float = Field(16.0, gt=0, description="scale; the update is alpha / rank * B A")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        min_length=1,
        description="names of the text encoder's linear layers that get an adapter",
    )
    unet: UnetLoraConfig | None = Field(
        None, description="train the U-Net too (or, with text_encoder: false, alone); {}: defaults"
    )
    init: str | None = Field(
        None,
        min_length=1,
        description="adapter to start from: a folder or file in any form that docs/adapters.md "
        "lists, with the same trained parts, layers and ranks; null: the base model",
    )

    @model_validator(mode="after")
    def _something(self) -> LoraConfig:
        if not self.text_encoder and self.unet is None:
            raise ValueError("text_encoder: false needs 'unet', or there is nothing to train")
        return self


class DiffusionConfig(_Section):
    """The Markov decision process: DDIM with noise, and classifier-free guidance."""

    steps: int = Field(50, ge=1, le=500, description="denoising steps")
    eta: float = Field(1.0, gt=0, le=1, description="share of DDPM noise; 0 has no likelihood")
    guidance_scale: float = Field(5.0, ge=0, description="g; at most 1 means no guidance")
    storage_dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="dtype of stored latents; the sampler continues from the stored value",
    )
    height: int | None = Field(None, ge=8, description="of images in pixels; null: the model's own")
    width: int | None = Field(None, ge=8, description="of images in pixels; null: the model's own")
    clip_skip: int | None = Field(
        None,
        ge=1,
        description="layers of the text encoder to leave out, counted as diffusers does: 1 takes "
        "the last but one (what other programs call 2)",
    )
    negative_prompt: str | None = Field(
        None,
        description="what guidance leads away from, through the same trained encoder; null: the "
        "empty prompt",
    )

    @model_validator(mode="after")
    def _guided(self) -> DiffusionConfig:
        if (self.height is None) != (self.width is None):
            raise ValueError("height, width: give both, or leave both null for the model's own")
        if self.negative_prompt and self.guidance_scale <= 1:
            raise ValueError(
                f"negative_prompt: has no effect with guidance_scale {self.guidance_scale:g}; "
                "leave it null, or set guidance_scale above 1"
            )
        return self


class PromptSource(_Section):
    """Where prompts come from: a built-in set, a file or folder, or a Hugging Face data set."""

    set: str | None = Field(None, description="name of a built-in prompt set")
    path: str | None = Field(
        None,
        description="file: .txt, .json, .jsonl, .csv, .tsv (each also as .gz) or .parquet; or a "
        "folder of .parquet files",
    )
    dataset: str | None = Field(
        None,
        description="Hugging Face data set: a hub id, or a folder. Needs: pip install "
        "'texforce-ray[datasets]'",
    )
    subset: str | None = Field(None, description="the data set's configuration, if it has several")
    split: str | None = Field(
        None, description="split of a data set or folder, e.g. 'train'; needed if it has several"
    )
    revision: str | None = Field(None, description="hub revision of the data set to pin")
    column: str = Field("prompt", description="field or column that holds the prompt's text")
    min_words: int = Field(1, ge=1, description="leave out shorter prompts")
    max_words: int | None = Field(None, ge=1, description="leave out longer prompts")
    part: Literal["all", "train", "test"] = Field(
        "all", description="'train' and 'test' share no prompt: a text's digest says which it is in"
    )
    test_share: float = Field(0.1, gt=0, lt=1, description="share of distinct texts in 'test'")
    limit: int | None = Field(None, ge=1, description="use only the first prompts of what is left")

    @model_validator(mode="after")
    def _one_source(self) -> PromptSource:
        given = [name for name in ("set", "path", "dataset") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of 'set' (a built-in set), 'path' (a file) and 'dataset' (of "
                f"Hugging Face), not {' and '.join(given) or 'none'}"
            )
        for name in ("subset", "revision"):
            if getattr(self, name) is not None and self.dataset is None:
                raise ValueError(f"{name}: means nothing without 'dataset'")
        if self.split is not None and self.set is not None:
            raise ValueError("split: a built-in set has no splits")
        return self


class PromptsConfig(_Section):
    """What is sampled in each iteration: prompts x samples."""

    train: PromptSource = Field(
        PromptSource(set="shapes", path=None), description="prompts that are trained on"
    )
    per_iteration: int = Field(16, ge=1, description="prompts drawn for each iteration")
    samples_per_prompt: int = Field(8, ge=1, description="images of each prompt, K")


class RolloutConfig(_Section):
    """Actors that generate trajectories."""

    num_workers: int = placement(1, "rollout actors", ge=1)
    min_workers: int | None = placement(
        None,
        "rollout actors that must be there to start; the others join when the cluster has room "
        "for them. Default: num_workers",
        ge=1,
    )
    batch_size: AutoSize = Field(
        32,
        ge=0,
        description="samples in one unit of work; 'auto': as many as memory allows, found before "
        "the run starts and stored in its config",
    )
    decode_batch_size: int = Field(8, ge=1, description="latents that the VAE decodes at once")
    num_threads: int = Field(2, ge=1, description="CPU threads of one actor (changes rounding)")
    num_cpus: float = placement(1.0, "CPUs that Ray reserves for each actor", ge=0)
    num_gpus: float = placement(0.0, "GPUs that Ray reserves for each actor", ge=0)
    resources: dict[str, float] = placement({}, "custom Ray resources for each actor")
    timeout_s: float = placement(1800.0, "deadline of one unit of work", gt=0)
    max_unscored: int | None = placement(
        None,
        "units sampled but not yet scored beyond which rollouts wait; default: 2 x num_workers + 2",
        ge=1,
    )

    @property
    def unscored_units(self) -> int:
        return self.max_unscored or 2 * self.num_workers + 2


class RewardConfig(_Section):
    """One component of the reward."""

    name: str | None = Field(None, description="a built-in reward")
    target: str | None = Field(None, description="your own reward: 'package.module:Class'")
    label: str | None = Field(None, description="name in metrics; default: name or class name")
    weight: float = safe(1.0, "factor in the weighted sum")
    normalize: Literal["none", "batch", "group"] = Field(
        "none",
        description="before the sum, shift and scale to mean 0, deviation 1: over the iteration "
        "('batch') or over each prompt's samples ('group'; with advantage.mode 'batch' it is GDPO)",
    )
    min: float | None = Field(
        None, description="gate: a sample whose raw score is lower gets the floor as its total"
    )
    floor: float = Field(
        0.0,
        description="total of a sample under the gate; in training it is also no higher than the "
        "lowest total above the gates",
    )
    kwargs: dict[str, Any] = Field({}, description="arguments of the reward's constructor")
    environment: str | None = placement(
        None,
        "where it runs: 'driver' (the run's own Python), 'isolated' (an environment of its own), "
        "the absolute path of an interpreter, or null: as the table of rewards says",
    )
    requirements: tuple[str, ...] = Field(
        (), description="packages of your own reward, 'name==version'; they make it isolated"
    )
    batch_size: int = Field(64, ge=1, description="images in one call of score()")
    merge_units: int = Field(
        1,
        ge=1,
        description="units of work scored in one call; more than 1 is faster with small units, but "
        "which units meet depends on timing, and with it the last bits of a model's scores",
    )
    num_threads: int = Field(1, ge=1, description="CPU threads of a server (changes rounding)")
    replicas: int = placement(1, "reward servers", ge=1)
    num_cpus: float = placement(0.1, "CPUs that Ray reserves for each server", ge=0)
    num_gpus: float = placement(0.0, "GPUs that Ray reserves for each server", ge=0)
    resources: dict[str, float] = placement({}, "custom Ray resources for each server")
    timeout_s: float = placement(
        300.0,
        "deadline of one call, after which its server is restarted; the web clients of built-in "
        "rewards stop a little earlier, whatever their own timeout_s and retries",
        gt=0,
    )
    retries: int = placement(
        2, "further tries of a failed call before its samples are masked", ge=0
    )
    retry_pause_s: float = placement(
        0.2, "pause before the first further try; doubled each time", ge=0
    )

    @model_validator(mode="after")
    def _one_target(self) -> RewardConfig:
        if (self.name is None) == (self.target is None):
            raise ValueError("give exactly one of 'name' (built in) and 'target' (your class)")
        if self.target is not None and self.target.count(":") != 1:
            raise ValueError(f"target {self.target!r} should look like 'package.module:Class'")
        if self.key != self.key.strip() or not self.key.isprintable() or len(self.key) > 100:
            raise ValueError(
                f"label: {self.key!r} should be up to 100 printable characters, without spaces "
                "around them"
            )
        return self

    @property
    def key(self) -> str:
        """The component's name in metrics, samples and errors."""
        return self.label or self.name or str(self.target).partition(":")[2]


class AdvantageConfig(_Section):
    """How rewards become advantages."""

    mode: Literal["prompt", "group", "batch"] = Field(
        "prompt",
        description="'prompt': rolling statistics per prompt (DDPO); 'group': per prompt within "
        "the iteration; 'batch': over the iteration",
    )
    clip: float = Field(5.0, gt=0, description="advantages are clipped to +-clip")
    buffer_size: int = Field(32, ge=2, description="rewards remembered per prompt")
    min_count: int = Field(16, ge=2, description="below it, the batch's statistics are used")
    scale: Literal["own", "batch"] = Field(
        "own",
        description="deviation to divide by: that of the prompt or group itself, or the batch's",
    )
    max_masked: float = placement(
        0.25, "share of unscored samples beyond which the run fails", ge=0, le=1
    )


class PpoConfig(_Section):
    """The policy update."""

    clip_range: float = Field(1e-4, gt=0, lt=1, description="lambda; r is clipped to 1 +- lambda")
    num_minibatches: int = Field(4, ge=1, description="optimizer updates in one epoch")
    epochs: int = Field(1, ge=1, description="passes over the iteration's samples")
    timestep_fraction: float = Field(0.5, gt=0, le=1, description="share of timesteps trained")
    timestep_choice: Literal["random", "first"] = Field(
        "random",
        description="'random': drawn for each sample (the paper); 'first': the noisiest ones, "
        "which decide what is in the image. With few denoising steps the last ones have a small "
        "sigma, and their likelihood drowns the others' gradient in noise",
    )
    kl_weight: float = safe(
        0.0,
        "weight of the KL to the base policy, averaged over latent dimensions as "
        "log-probabilities are",
        ge=0,
    )
    target_kl: float | None = safe(
        None,
        "an iteration's updates end early at a minibatch whose approx_kl exceeds it",
        gt=0,
    )
    max_skipped: int = placement(
        3,
        "updates in a row that may be left out because their gradient is not finite; one more "
        "stops the run",
        ge=0,
    )
    decoupled: Literal["auto", "always", "never"] = Field(
        "auto",
        description="clip against log-probabilities recomputed by the learner; 'auto': when "
        "max_staleness > 0 or not all numbers are float32",
    )
    behaviour_cap: float = Field(
        2.0, gt=0, description="c, cap of the weight pi_prox / pi_behaviour"
    )
    max_ratio_error: float | None = placement(
        None,
        "the run fails if |r - 1| exceeds it on an iteration's first minibatch, before the first "
        "update; default: 1e-4 in float32, no bound otherwise",
        gt=0,
        allow_inf_nan=True,
    )


class DirectConfig(_Section):
    """Instead of PPO: backpropagation of differentiable rewards through the last steps."""

    method: Literal["refl", "draft", "alignprop"] = Field(
        "refl",
        description="'refl': leap from a late step to the image; 'draft': denoise the last steps "
        "with gradient; 'alignprop': as many of them as are drawn for each update",
    )
    steps: int = Field(
        1,
        ge=1,
        description="K: 'draft' takes the last K steps, the others one to K, drawn for each update",
    )
    gradient_checkpointing: bool = Field(
        False, description="compute the U-Net twice rather than keep its activations"
    )


class OptimizerConfig(_Section):
    """AdamW on the adapter."""

    lr: float = safe(3e-4, "peak learning rate", gt=0)
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.999), description="Adam's decay rates")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="share of updates in warm-up")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="exponential average of the adapter, used for evaluation"
    )


class LearnerConfig(_Section):
    """The actor that trains."""

    num_workers: int = placement(
        1, "learner actors that share each update; must divide gradient_shards", ge=1
    )
    microbatch_size: AutoSize = Field(
        64,
        ge=0,
        description="(sample, timestep) pairs in one pass through the U-Net; with 'direct' those "
        "of all steps with gradient, but at least one image; 'auto' as for rollout.batch_size",
    )
    gradient_shards: int = Field(
        1,
        ge=1,
        description="fixed parts of a minibatch whose gradients are summed in order, so that the "
        "number of learners changes no bit of the result",
    )
    gradient_checkpointing: bool = placement(
        False, "compute the U-Net's activations twice rather than keep them: a third slower"
    )
    colocated: bool = placement(
        False,
        "the learner lives in the rollout actor and shares its weights and device, in turns; for "
        "one GPU. learner.num_cpus and num_gpus are not asked for",
    )
    num_threads: int = Field(2, ge=1, description="CPU threads of one (changes rounding)")
    num_cpus: float = placement(0.5, "CPUs that Ray reserves for each", ge=0)
    num_gpus: float = placement(0.0, "GPUs that Ray reserves for each", ge=0)
    resources: dict[str, float] = placement({}, "custom Ray resources")
    timeout_s: float = placement(7200.0, "deadline of one iteration's updates", gt=0)
    min_gradient_agreement: float = placement(
        0.9,
        "in half precision, the least cosine of the first gradient to the same in float32; below "
        "it the run stops before its first update",
        ge=-1,
        le=1,
    )


class PlacementConfig(_Section):
    """Roles as resources: which nodes may hold which actors.

    Each value names a custom Ray resource that nodes offer, e.g. `ray start --resources
    '{"rollout": 1}'`. Every actor of the role takes a sliver of it, so any number of them fits.
    """

    rollout: str | None = placement(
        None, "custom resource of the nodes for rollout actors, e.g. 'rollout'; null: any node"
    )
    reward: str | None = placement(None, "custom resource of the nodes for reward servers")
    learner: str | None = placement(None, "custom resource of the nodes for learners")

    @model_validator(mode="after")
    def _custom(self) -> PlacementConfig:
        for role in ("rollout", "reward", "learner"):
            name = getattr(self, role)
            if name is not None and (name != name.strip() or not name):
                raise ValueError(f"{role}: {name!r} is no name of a resource; null: any node")
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError(
                    f"{role}: {name!r} is not a custom resource: every node has it. Start nodes "
                    f"with e.g. --resources '{{\"{role}\": 1}}' and name that"
                )
        return self


class EvalConfig(_Section):
    """Evaluation on prompts and seeds that are never trained on."""

    every: int = Field(5, ge=0, description="iterations between evaluations; 0: never in the run")
    prompts: PromptSource | None = Field(
        None, description="prompts to evaluate on; default: the training prompts, other seeds"
    )
    unseen: PromptSource | None = Field(
        None, description="prompts that are never trained on: the end compares on these too"
    )
    images: int = Field(64, ge=1, description="images of one evaluation in the run")
    final_images: int = Field(
        0, ge=0, description="images of base against tuned at the end; 0: skip it"
    )
    guidance_scale: float | None = Field(
        None, ge=0, description="guidance of evaluations; null: diffusion.guidance_scale"
    )
    eta: float | None = Field(
        None,
        ge=0,
        le=1,
        description="eta of evaluations; 0: as stock pipelines draw; null: diffusion.eta",
    )
    guidance_curve: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=list,
        description="the end compares at each of these guidance scales too, e.g. [1, 2, 3, 5]",
    )
    curve_images: int = Field(64, ge=1, description="images of each point of that curve")
    grid: int = Field(16, ge=1, description="images in the grid, the same prompts and seeds always")
    seed: int = Field(1_000_003, ge=0, description="seed of the evaluation's noise")


class CheckpointConfig(_Section):
    """What is kept in the run directory."""

    every: int = placement(1, "iterations between checkpoints", ge=1)
    keep_last: int = placement(2, "newest checkpoints kept; the best one stays besides", ge=1)


class RayConfig(_Section):
    """How to reach Ray."""

    address: str | None = placement(
        None, "'auto' or an address joins that cluster; null: RAY_ADDRESS if set, else a new one"
    )
    start_timeout_s: float = placement(180.0, "deadline for all actors to be ready", gt=0)
    resource_timeout_s: float = placement(20.0, "how long to wait for room on the cluster", gt=0)
    max_restarts: int = placement(
        3,
        "restarts of each rollout actor and learner; those of reward servers count against "
        "max_run_restarts alone",
        ge=0,
    )
    max_run_restarts: int = placement(
        100, "failures of actors in one run beyond which it stops", ge=0
    )
    watchdog_s: float = placement(
        300.0, "after so long without any result, the run says what it waits for", gt=0
    )
    task_retries: int = placement(3, "further tries of a unit of work whose actor died", ge=0)
    environments: str | None = placement(
        None,
        "folder of the rewards' environments on every node; default: TEXFORCE_ENVIRONMENTS, "
        "else ~/.cache/texforce_ray/environments",
    )
    environment_timeout_s: float = placement(1800.0, "deadline of building one", gt=0)
    dashboard: bool = placement(False, "start the dashboard with a new local cluster")
    autoscale: Literal["auto"] | bool = placement(
        "auto",
        "ask the cluster's autoscaler for what the run needs and give it back at the end; 'auto': "
        "where one is at work",
    )
    autoscale_timeout_s: float = placement(
        900.0, "how long to wait for room where an autoscaler is adding nodes", gt=0
    )


class WandbConfig(_Section):
    """A run at Weights & Biases. Its key comes from WANDB_API_KEY or `wandb login`."""

    project: str = placement("texforce", "project in which the run appears", min_length=1)
    name: str | None = placement(None, "name of the run; default: that of the run directory")
    entity: str | None = placement(None, "user or team; default: the key's own")
    mode: Literal["online", "offline"] = placement(
        "online", "'offline': into RUN_DIR/wandb alone, to be sent later by `wandb sync`"
    )


class MlflowConfig(_Section):
    """A run of an MLflow experiment. Keys come from the environment (MLFLOW_TRACKING_TOKEN)."""

    uri: str | None = placement(
        None, "tracking server, e.g. http://mlflow:5000; null: files in RUN_DIR/mlflow"
    )
    experiment: str = placement("texforce", "experiment; made if missing", min_length=1)


class TrackConfig(_Section):
    """Where metrics and grids go besides the run directory and its TensorBoard files."""

    wandb: WandbConfig | None = placement(
        None, "Weights & Biases; {}: defaults. Needs: pip install 'texforce-ray[wandb]'"
    )
    mlflow: MlflowConfig | None = placement(
        None, "MLflow; {}: defaults. Needs: pip install 'texforce-ray[mlflow]'"
    )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Config(_Section):
    """Everything that a run needs."""

    seed: int = Field(0, ge=0, description="all prompts, noise and timesteps follow from it")
    run_dir: str = placement(
        "runs/{time}", "where results go; {time} becomes the starting time", min_length=1
    )
    iterations: int = safe(20, "iterations of sampling and updating", ge=1)
    max_staleness: int = Field(
        0, ge=0, le=1, description="k: iteration i is sampled with policy version max(0, i - k)"
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="the frozen pipeline")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="the trained adapter")
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig, description="the MDP")
    prompts: PromptsConfig = Field(default_factory=PromptsConfig, description="what is sampled")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="rollout actors")
    rewards: Annotated[tuple[RewardConfig, ...], BeforeValidator(_as_list)] = Field(
        (RewardConfig(name="shapes"),), min_length=1, description="components of the reward"
    )
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig, description="baseline")
    ppo: PpoConfig = Field(default_factory=PpoConfig, description="policy update")
    direct: DirectConfig | None = Field(
        None,
        description="train by backpropagation of differentiable rewards instead of PPO; {}: "
        "defaults. ppo.epochs and ppo.num_minibatches still say how many updates there are",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW")
    learner: LearnerConfig = Field(default_factory=LearnerConfig, description="learner actor")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="evaluation")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="what is kept"
    )
    ray: RayConfig = Field(default_factory=RayConfig, description="how to reach Ray")
    track: TrackConfig = Field(default_factory=TrackConfig, description="trackers")
    profile: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_list)] = (
        placement(
            (),
            "iterations, counted from 0, that are profiled into RUN_DIR/profile; what is profiled "
            "is slower",
        )
    )
    # Last: its name hides the function of that name in the rest of this class.
    placement: PlacementConfig = Field(
        default_factory=PlacementConfig, description="which nodes may hold which actors"
    )

    @property
    def samples_per_iteration(self) -> int:
        return self.prompts.per_iteration * self.prompts.samples_per_prompt

    @property
    def units_per_iteration(self) -> int:
        return self.samples_per_iteration // self.rollout.batch_size

    def sized_like(self, other: Config) -> Config:
        """With sizes left to memory ('auto') as another run found them."""
        r, t = self.rollout, self.learner
        batch = r.batch_size or other.rollout.batch_size
        micro = t.microbatch_size or other.learner.microbatch_size
        return self.model_copy(
            update={
                "rollout": r.model_copy(update={"batch_size": batch}),
                "learner": t.model_copy(update={"microbatch_size": micro}),
            }
        )

    @property
    def minibatch_size(self) -> int:
        return self.samples_per_iteration // self.ppo.num_minibatches

    @property
    def evaluation_guidance(self) -> float:
        given = self.eval.guidance_scale
        return self.diffusion.guidance_scale if given is None else given

    @property
    def evaluation_eta(self) -> float:
        return self.diffusion.eta if self.eval.eta is None else self.eval.eta

    @property
    def total_updates(self) -> int:
        return self.iterations * self.ppo.epochs * self.ppo.num_minibatches

    @property
    def trained_timesteps(self) -> int:
        """Timesteps of each sample that are trained on."""
        return max(1, round(self.diffusion.steps * self.ppo.timestep_fraction))

    @property
    def exact_numerics(self) -> bool:
        """Whether sampler and learner compute in float32 throughout."""
        return self.model.dtype == "float32" and self.diffusion.storage_dtype == "float32"

    @property
    def decoupled(self) -> bool:
        if self.ppo.decoupled == "auto":
            return self.max_staleness > 0 or not self.exact_numerics
        return self.ppo.decoupled == "always"

    @property
    def max_ratio_error(self) -> float:
        if self.ppo.max_ratio_error is not None:
            return self.ppo.max_ratio_error
        return 1e-4 if self.exact_numerics else math.inf

    @model_validator(mode="after")
    def _arithmetic(self) -> Config:
        samples = self.samples_per_iteration
        what = (
            f"prompts.per_iteration x prompts.samples_per_prompt = "
            f"{self.prompts.per_iteration} x {self.prompts.samples_per_prompt} = {samples} samples"
        )
        if self.rollout.batch_size and samples % self.rollout.batch_size:
            raise ValueError(
                f"rollout.batch_size: {self.rollout.batch_size} does not divide {what}; "
                f"possible: {_divisors(samples)}"
            )
        if samples % self.ppo.num_minibatches:
            raise ValueError(
                f"ppo.num_minibatches: {self.ppo.num_minibatches} does not divide {what}; "
                f"possible: {_divisors(samples)}"
            )
        if self.minibatch_size % self.learner.gradient_shards:
            raise ValueError(
                f"learner.gradient_shards: {self.learner.gradient_shards} does not divide the "
                f"minibatch of {self.minibatch_size} samples; "
                f"possible: {_divisors(self.minibatch_size)}"
            )
        if self.learner.gradient_shards % self.learner.num_workers:
            raise ValueError(
                f"learner.num_workers: {self.learner.num_workers} does not divide "
                f"learner.gradient_shards = {self.learner.gradient_shards}; set gradient_shards to "
                "a multiple of the most learners that you may want"
            )
        self._check_colocated()
        if self.learner.num_workers > 1 and 0 < self.learner.num_gpus < 1:
            raise ValueError(
                f"learner.num_gpus: {self.learner.num_gpus:g} with learner.num_workers = "
                f"{self.learner.num_workers}: learners that share a GPU cannot exchange gradients "
                "(NCCL: duplicate GPU); use 1 each, or one learner"
            )
        if late := [i for i in self.profile if i >= self.iterations]:
            raise ValueError(
                f"profile: there is no iteration {late[0]}: they are counted from 0 to "
                f"{self.iterations - 1}"
            )
        if (self.rollout.min_workers or 1) > self.rollout.num_workers:
            raise ValueError(
                f"rollout.min_workers: {self.rollout.min_workers} is more than "
                f"rollout.num_workers = {self.rollout.num_workers}"
            )
        a = self.advantage
        if self.direct is not None:
            self._check_direct()  # no advantages there
        elif a.mode == "prompt" and a.buffer_size < max(
            a.min_count, self.prompts.samples_per_prompt
        ):
            raise ValueError(
                f"advantage.buffer_size: {a.buffer_size} should be at least advantage.min_count = "
                f"{a.min_count} and prompts.samples_per_prompt = "
                f"{self.prompts.samples_per_prompt}"
            )
        elif a.mode == "group" and self.prompts.samples_per_prompt < 2:
            raise ValueError(
                "prompts.samples_per_prompt: 1 with advantage.mode 'group' makes every advantage "
                "0; use at least 2 samples per prompt, or mode 'prompt' or 'batch'"
            )
        self._check_names()
        return self

    def _check_colocated(self) -> None:
        if not self.learner.colocated:
            return
        if (self.learner.num_workers, self.rollout.num_workers) != (1, 1):
            raise ValueError(
                "learner.colocated: needs rollout.num_workers = 1 and learner.num_workers = 1"
            )
        if self.max_staleness:
            raise ValueError(
                f"max_staleness: {self.max_staleness} with learner.colocated would sample ahead in "
                "the actor that is busy with the update: nothing overlaps, and samples wait until "
                "their deadline; set max_staleness=0, or learner.colocated=false"
            )
        if self.placement.learner not in (None, self.placement.rollout):
            raise ValueError(
                f"placement.learner: {self.placement.learner!r} means nothing with "
                "learner.colocated, where the learner lives in the rollout actor; leave it null"
            )

    def _check_names(self) -> None:
        keys = [reward.key for reward in self.rewards]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"rewards: {sorted(twice)} named twice; give each its own 'label'")
        # In metrics these names are taken, by the sum of all rewards and by what images look like.
        taken = {"total", "diversity", "drift", "style_drift"}
        taken |= {f"base_{key}" for key in ("total", *keys)}
        if wrong := [key for key in keys if key in taken]:
            raise ValueError(
                f"rewards: the name {wrong[0]!r} has another meaning in metrics; give this reward "
                "another 'label'"
            )

    def _check_direct(self) -> None:
        if self.ppo.kl_weight:
            raise ValueError(
                f"ppo.kl_weight: {self.ppo.kl_weight} has no effect with 'direct', which does not "
                "train by PPO; leave it 0"
            )
        trained = [reward for reward in self.rewards if reward.weight]
        if not trained:
            raise ValueError("rewards: with 'direct' at least one needs a weight other than 0")
        for reward in trained:
            if reward.min is not None or reward.normalize != "none":
                raise ValueError(
                    f"rewards: {reward.key} has 'min' or 'normalize', through which 'direct' "
                    "cannot differentiate; leave both out"
                )

    def placement_free(self) -> dict[str, Any]:
        """The result-affecting fields alone, as plain data: must be equal on resume."""
        return _without_placement(self)


def _divisors(n: int) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return ", ".join(map(str, divisors[-12:]))


def _without_placement(section: BaseModel) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("placement"):
            continue
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            value = _without_placement(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            value = [_without_placement(v) for v in value]
        kept[name] = value
    return json.loads(json.dumps(kept))


def safe_paths() -> set[str]:
    """Dotted paths of the fields that may change on resume and are then recorded."""
    return {".".join(path) for path, field in _fields(Config) if _is_safe(field)}


def _is_safe(field: Any) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("safe"))


def _fields(
    model: type[BaseModel], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, field in model.model_fields.items():
        yield (*prefix, name), field
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _fields(part, (*prefix, name))


def field_paths(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Dotted paths of all fields, parents before children; entries of lists without an index."""
    return (path for path, _ in _fields(model))
