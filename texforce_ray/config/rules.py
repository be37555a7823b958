"""Rules that hold between sections of the configuration: one named function for each.

A broken rule raises ValueError, which names the key, its value, and what would be right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from texforce_ray.config.learning import ForwardObjective, PpoObjective

if TYPE_CHECKING:
    from texforce_ray.config.schema import Config


def units_divide_an_iteration(config: Config) -> None:
    samples, size = config.samples_per_iteration, config.rollout.batch_size
    if size and samples % size:
        raise ValueError(
            f"rollout.batch_size: {size} does not divide {_samples(config)}; "
            f"possible: {_divisors(samples)}"
        )


def minibatches_divide_an_iteration(config: Config) -> None:
    samples = config.samples_per_iteration
    if samples % config.update.minibatches:
        raise ValueError(
            f"update.minibatches: {config.update.minibatches} does not divide "
            f"{_samples(config)}; possible: {_divisors(samples)}"
        )


def shards_divide_a_minibatch(config: Config) -> None:
    if config.minibatch_size % config.learner.gradient_shards:
        raise ValueError(
            f"learner.gradient_shards: {config.learner.gradient_shards} does not divide the "
            f"minibatch of {config.minibatch_size} samples; "
            f"possible: {_divisors(config.minibatch_size)}"
        )


def learners_divide_the_shards(config: Config) -> None:
    learner = config.learner
    if learner.gradient_shards % learner.num_workers:
        raise ValueError(
            f"learner.num_workers: {learner.num_workers} does not divide "
            f"learner.gradient_shards = {learner.gradient_shards}; set gradient_shards to a "
            "multiple of the largest number of learners that you may want"
        )


def a_colocated_learner_takes_turns(config: Config) -> None:
    if not config.learner.colocated:
        return
    if (config.learner.num_workers, config.rollout.num_workers) != (1, 1):
        raise ValueError(
            "learner.colocated: needs rollout.num_workers = 1 and learner.num_workers = 1"
        )
    if config.max_staleness:
        raise ValueError(
            f"max_staleness: {config.max_staleness} with learner.colocated would sample ahead in "
            "the actor that is busy with the update: nothing overlaps, and samples wait until "
            "their deadline; set max_staleness=0, or learner.colocated=false"
        )
    if config.placement.learner not in (None, config.placement.rollout):
        raise ValueError(
            f"placement.learner: {config.placement.learner!r} cannot be used with "
            "learner.colocated, which runs the learner in the rollout actor; leave it null"
        )


def learners_share_no_gpu(config: Config) -> None:
    learner = config.learner
    if learner.num_workers > 1 and 0 < learner.num_gpus < 1:
        raise ValueError(
            f"learner.num_gpus: {learner.num_gpus:g} with learner.num_workers = "
            f"{learner.num_workers}: learners that share a GPU cannot exchange gradients "
            "(NCCL: duplicate GPU); use 1 each, or one learner"
        )


def profiled_iterations_exist(config: Config) -> None:
    if late := [i for i in config.profile if i >= config.iterations]:
        raise ValueError(
            f"profile: there is no iteration {late[0]}: iterations are counted from 0 to "
            f"{config.iterations - 1}"
        )


def enough_rollouts_to_start(config: Config) -> None:
    rollout = config.rollout
    if (rollout.min_workers or 1) > rollout.num_workers:
        raise ValueError(
            f"rollout.min_workers: {rollout.min_workers} is more than "
            f"rollout.num_workers = {rollout.num_workers}"
        )


def advantages_have_something_to_compare(config: Config) -> None:
    a, samples = config.advantage, config.prompts.samples_per_prompt
    if config.direct is not None:  # no advantages there
        return
    if a.mode == "prompt" and a.buffer_size < max(a.min_count, samples):
        raise ValueError(
            f"advantage.buffer_size: {a.buffer_size} should be at least advantage.min_count = "
            f"{a.min_count} and prompts.samples_per_prompt = {samples}"
        )
    if a.mode == "group" and samples < 2:
        raise ValueError(
            "prompts.samples_per_prompt: 1 with advantage.mode 'group' makes every advantage "
            "0; use at least 2 samples per prompt, or mode 'prompt' or 'batch'"
        )


def rewards_can_be_differentiated(config: Config) -> None:
    if config.direct is None:
        return
    trained = [reward for reward in config.rewards if reward.weight]
    if not trained:
        raise ValueError(
            "rewards: with objective.kind 'direct' at least one needs a weight other than 0"
        )
    for reward in trained:
        if reward.min is not None or reward.normalize != "none":
            raise ValueError(
                f"rewards: {reward.key} has 'min' or 'normalize', through which 'direct' "
                "cannot differentiate; leave both out"
            )


def likelihoods_need_noise(config: Config) -> None:
    if config.objective.kind == "ppo" and not config.diffusion.eta:
        raise ValueError(
            "diffusion.eta: 0 samples without noise, so PPO has no likelihood to train on; use "
            "eta 1, or an objective.kind that needs none: nft, awm, rwr, raft, direct"
        )


def samples_of_another_dtype_need_no_likelihood(config: Config) -> None:
    dtype = config.rollout.dtype
    if dtype in (None, config.model.dtype):
        return
    if not isinstance(config.objective, ForwardObjective):
        raise ValueError(
            f"rollout.dtype: {dtype} with model.dtype {config.model.dtype}, but objective.kind "
            f"{config.objective.kind!r} may compute the samples' steps again, which must then be "
            "the same; leave it null, or use nft, awm, rwr or raft"
        )
    if config.learner.colocated:
        raise ValueError(
            f"rollout.dtype: {dtype} with learner.colocated, which has one set of weights, in "
            f"model.dtype {config.model.dtype}; leave it null"
        )


def direct_backpropagation_recomputes_by_itself(config: Config) -> None:
    if config.direct is not None and config.learner.gradient_checkpointing:
        raise ValueError(
            f"learner.gradient_checkpointing: {config.learner.gradient_checkpointing} has no "
            "effect with objective.kind 'direct'; set objective.gradient_checkpointing"
        )


def a_window_is_trained_whole(config: Config) -> None:
    if config.diffusion.window is None or not isinstance(config.objective, PpoObjective):
        return
    plain = PpoObjective()
    for name in ("timestep_choice", "timestep_fraction"):
        if (value := getattr(config.objective, name)) != getattr(plain, name):
            raise ValueError(
                f"objective.{name}: {value!r} has no effect with diffusion.window, all of whose "
                "steps are trained; leave it out"
            )


def negative_prompts_need_guidance(config: Config) -> None:
    d, most = config.diffusion, max(config.guidance_scales)
    if d.negative_prompt and d.process == "ddim" and most <= 1:
        raise ValueError(
            f"diffusion.negative_prompt: has no effect with guidance_scale {most:g}; leave it "
            "null, or set diffusion.guidance_scale or eval.guidance_scale above 1"
        )


def no_kernel_means_no_noise(config: Config) -> None:
    if config.diffusion.kernel == "ode" and config.evaluation_eta:
        raise ValueError(
            f"eval.eta: {config.evaluation_eta:g} with diffusion.kernel 'ode', which adds no "
            "noise; use 0"
        )


def anchored_embeddings_are_trained(config: Config) -> None:
    weight = getattr(config.objective, "embedding_anchor_weight", 0.0)
    if weight and not config.lora.encoders:
        raise ValueError(
            f"objective.embedding_anchor_weight: {weight:g}, but no text encoder is trained, so "
            "embeddings never change; set it to 0, or use objective.anchor_weight"
        )


def the_best_are_some_of_a_group(config: Config) -> None:
    best, samples = getattr(config.objective, "best", 0), config.prompts.samples_per_prompt
    group, of = samples, f"prompts.samples_per_prompt = {samples}"
    if samples == 1:  # then all of an iteration's samples compete
        group = config.samples_per_iteration
        of = f"the iteration's {group} samples"
    if best >= group:
        raise ValueError(f"objective.best: {best} of {of} selects nothing; use at most {group - 1}")


def measured_steps_are_exact(config: Config) -> None:
    objective = config.objective
    if not isinstance(objective, PpoObjective) or config.exact_numerics:
        return
    variant = "level" if objective.level == "guard" else "trust"
    if objective.decoupled == "never" and objective.needs_means:
        raise ValueError(
            f"objective.{variant}: {getattr(objective, variant)!r} compares means, which rounded "
            "latents do not give back: set objective.decoupled to 'auto', or "
            "diffusion.storage_dtype and model.dtype to float32"
        )


def rewards_have_names_of_their_own(config: Config) -> None:
    keys = [reward.key for reward in config.rewards]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"rewards: {sorted(twice)} named twice; give each its own 'label'")
    # Metrics use these names for the sum of all rewards and for statistics of the images.
    taken = {"total", "diversity", "drift", "style_drift", "high_frequency", "grid"}
    taken |= {f"base_{key}" for key in ("total", "high_frequency", "grid", *keys)}
    if wrong := [key for key in keys if key in taken]:
        raise ValueError(
            f"rewards: the name {wrong[0]!r} has another meaning in metrics; give this reward "
            "another 'label'"
        )


# Only the first broken rule is reported.
RULES = (
    units_divide_an_iteration,
    minibatches_divide_an_iteration,
    shards_divide_a_minibatch,
    learners_divide_the_shards,
    a_colocated_learner_takes_turns,
    learners_share_no_gpu,
    profiled_iterations_exist,
    enough_rollouts_to_start,
    rewards_can_be_differentiated,
    direct_backpropagation_recomputes_by_itself,
    advantages_have_something_to_compare,
    likelihoods_need_noise,
    samples_of_another_dtype_need_no_likelihood,
    a_window_is_trained_whole,
    negative_prompts_need_guidance,
    no_kernel_means_no_noise,
    anchored_embeddings_are_trained,
    the_best_are_some_of_a_group,
    measured_steps_are_exact,
    rewards_have_names_of_their_own,
)


def _samples(config: Config) -> str:
    prompts = config.prompts
    return (
        f"prompts.per_iteration x prompts.samples_per_prompt = {prompts.per_iteration} x "
        f"{prompts.samples_per_prompt} = {config.samples_per_iteration} samples"
    )


def _divisors(n: int) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return ", ".join(map(str, divisors[-12:]))
