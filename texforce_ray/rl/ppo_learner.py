"""PPO's policy update: trajectories and advantages in, a better adapter out. No Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from texforce_ray import randomness
from texforce_ray.artifacts.snapshot import PolicySnapshot
from texforce_ray.config import Config
from texforce_ray.diffusion.process import Process
from texforce_ray.diffusion.sensitivity import check_trained
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.errors import NumericsError
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.conditioning import Prepared
from texforce_ray.model.flops import PassFlops
from texforce_ray.model.transfer import to_device
from texforce_ray.rl import ppo
from texforce_ray.rl.learner import Learner
from texforce_ray.rl.likelihood import Likelihood, Pairs
from texforce_ray.rl.ppo_anchor import Anchor, Means, level_weights, surrogate
from texforce_ray.rl.ppo_totals import Totals, mean_metrics
from texforce_ray.rl.precision import loss_scale
from texforce_ray.rl.sharding import UpdateBatch
from texforce_ray.rl.through_encoder import gradient_of

_PROBED = 4  # samples, and steps of each, whose gradient is checked in half precision


class PpoLearner(Learner):
    """PPO on the text encoder's LoRA adapter, the U-Net's, or both."""

    needs_likelihood = True

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        whole = self._denoiser.process
        check_trained(whole, candidate_steps(config, whole).tolist())
        if config.learner.gradient_checkpointing is True:
            backbone.denoiser.enable_gradient_checkpointing()

    @property
    def likelihood(self) -> Likelihood:
        """Of the current iteration's steps."""
        trained = min(self.config.trained_timesteps, len(self.process.trainable))
        return self._likelihood(self.denoiser, trained)

    @property
    def level(self) -> Tensor | None:
        """Each step's weight in the loss, [T]; None: all are equal."""
        if self.config.ppo.level == "none":
            return None
        candidates = candidate_steps(self.config, self.process)
        return level_weights(self.config.ppo, self.process, candidates)

    @staticmethod
    def kept_latents(
        config: Config, process: Process, iteration: int, first: int, count: int
    ) -> np.ndarray:
        """The latents before and after each trained step."""
        keep = np.zeros((count, len(process) + 1), dtype=bool)
        steps = trained_steps(config, process, iteration, config.samples_per_iteration)
        for end in (0, 1):
            keep[np.arange(count)[:, None], steps[first : first + count] + end] = True
        return keep

    def update(self, batch: UpdateBatch, behaviour: PolicySnapshot | None = None) -> dict:
        config = self.config
        steps = trained_steps(config, self.process, self.version, len(batch))
        stored = torch.from_numpy(np.array(batch.trajectory.log_probs))
        anchor = Anchor.of(stored)
        minibatches = [
            rows
            for epoch in range(config.update.epochs)
            for rows in self._minibatches(batch, epoch)
        ]
        # The first one with an unmasked sample.
        first = next((rows for rows in minibatches if batch.mask[rows].any()), minibatches[0])
        error: float | None = None
        if behaviour is not None:
            error = self._ratio_error(batch, first, steps, behaviour)
        if config.uses_decoupled:
            anchor, proximal_error = self._proximal(batch, steps, stored)
            if error is None:
                error = self._largest(proximal_error)
        if error is not None:
            self._check_agreement(error)
        checked = self.check_gradient(batch, lambda: self._probe(batch, first, steps))
        totals = [Totals(self.backbone.device) for _ in self._shards(np.arange(len(batch)))]
        norms: list[float] = []
        skipped = 0
        for rows in minibatches:
            if not batch.mask[rows].any():
                self._pass_over()
                skipped += 1
                continue
            gradient = self._minibatch_gradient(batch, rows, steps, anchor, totals)
            if error is None:
                # No update has been applied since these samples were drawn, so these first
                # ratios must be 1.
                error = self._largest(*(total.ratio_error for total in totals))
                self._check_agreement(error)
            if self._too_far(totals):
                break
            norms.append(self._apply(gradient))
        left_out = len(minibatches) - len(norms) - skipped
        self.version += 1
        return {
            **mean_metrics(self._gathered([shard.row() for shard in totals])),
            **self._norm_metrics(norms),
            **({} if config.ppo.target_kl is None else {"ppo/updates_left_out": left_out}),
            "ppo/ratio_error_first_pass": 0.0 if error is None else error,
            **checked,
            **self._rates(),
        }

    def update_flops(self, metrics: Mapping[str, float], cost: PassFlops) -> float:
        passes = metrics["ppo/trained_pairs"] * self.denoiser.passes
        # Without gradient: the base policy's mean and, once an iteration, the proximal policy's.
        extra = float(bool(self.config.ppo.kl_weight))
        extra += self.config.uses_decoupled / self.config.update.epochs
        return passes * (cost.trained + extra * cost.forward)

    def _check_agreement(self, error: float) -> None:
        allowed = self.config.ratio_error_bound
        if not error <= allowed:
            raise NumericsError(
                f"learner and sampler disagree: |ratio - 1| = {error:.2e} on the first pass of "
                f"iteration {self.version}, but at most {allowed:.0e} is allowed "
                "(objective.max_ratio_error); use float32 for model.dtype and "
                "diffusion.storage_dtype, or set objective.decoupled=always and a larger bound"
            )

    def _too_far(self, totals: Sequence[Totals]) -> bool:
        """Whether the minibatch's approx_kl, over all learners, exceeds the target."""
        target = self.config.ppo.target_kl
        if target is None:
            return False
        count, kl = self._gathered([total.take_kl() for total in totals]).sum(axis=0)
        # A KL that is not finite is not "too far": `_apply` skips and counts that update.
        return bool(np.isfinite(kl)) and kl > target * max(1.0, count)

    def _largest(self, *errors: float) -> float:
        """The maximum over all learners."""
        return float(self._gathered([[error] for error in errors]).max())

    def _ratio_error(
        self, batch: UpdateBatch, rows: np.ndarray, steps: np.ndarray, behaviour: PolicySnapshot
    ) -> float:
        """Largest |r - 1| on samples `rows`, with the weights that sampled them."""
        own = self.adapter.snapshot(self.version)
        self.adapter.load_weights(behaviour.adapters)
        errors = []
        for shard in self._shards(rows):
            pairs = Pairs.of(shard[batch.mask[shard]], steps, batch.first)
            log_probs = self.likelihood.log_probs(batch.trajectory, pairs).cpu()
            errors.append(ppo.ratio_error(log_probs, _stored(batch.trajectory, pairs)))
        self.adapter.load_weights(own.adapters)
        return self._largest(*errors)

    def _proximal(
        self, batch: UpdateBatch, steps: np.ndarray, stored: Tensor
    ) -> tuple[Anchor, float]:
        """The current policy, with decoupled PPO's weights, and the largest |r - 1|.

        It is meaningful only at trained pairs: a step with sigma = 0 has no likelihood, and masked
        samples are not used.
        """
        log_probs, error = stored.clone(), 0.0
        means: Means | None = {} if self.config.ppo.needs_means else None
        for shard in self._shards(np.arange(len(batch))):
            pairs = Pairs.of(shard[batch.mask[shard]], steps, batch.first)
            current = self.likelihood.log_probs(batch.trajectory, pairs, means=means).cpu()
            # Not max(), which may return either of a number and NaN.
            error = float(
                np.maximum(error, ppo.ratio_error(current, _stored(batch.trajectory, pairs)))
            )
            log_probs[pairs.sample, pairs.step] = current
        weight = ppo.behaviour_weight(log_probs, stored, self.config.ppo.behaviour_cap)
        return Anchor(log_probs, weight, means or {}), error

    def _probe(self, batch: UpdateBatch, rows: np.ndarray, steps: np.ndarray) -> list[Tensor]:
        """The gradient of a few of this learner's pairs: what `check_gradient` compares.

        It is the plain policy gradient: which pairs PPO clips depends on rounding, and advantages
        may all be 0.
        """
        kept = np.concatenate(self._shards(rows))
        kept = kept[batch.mask[kept]][:_PROBED]
        if not len(kept):
            return [torch.zeros_like(p) for p in self.parameters]
        spread = np.linspace(0, steps.shape[1] - 1, min(_PROBED, steps.shape[1])).round()
        pairs = Pairs.of(kept, steps[:, spread.astype(np.int64)], batch.first)
        log_probs = torch.from_numpy(np.array(batch.trajectory.log_probs))
        current = self.likelihood.log_probs(batch.trajectory, pairs, self.microbatch_size)
        log_probs[pairs.sample, pairs.step] = current.cpu()
        # The valid pairs of the whole minibatch: they determine how small its gradient is.
        valid = int(batch.mask[rows].sum()) * steps.shape[1]
        return self._shard_gradient(
            replace(batch, advantages=np.ones(len(batch))),
            pairs,
            Anchor.of(log_probs),
            valid,
            Totals(self.backbone.device),
            plain=True,
        )

    def _minibatch_gradient(
        self,
        batch: UpdateBatch,
        rows: np.ndarray,
        steps: np.ndarray,
        anchor: Anchor,
        totals: Sequence[Totals],
    ) -> list[Tensor]:
        """The gradient of the loss over the samples `rows`, across all learners' shards."""
        valid = int(batch.mask[rows].sum()) * steps.shape[1]
        parts: list[list[Tensor] | None] = []
        for shard, total in zip(self._shards(rows), totals, strict=True):
            kept = shard[batch.mask[shard]]
            pairs = Pairs.of(kept, steps, batch.first)
            part = None
            if len(kept):
                part = self._shard_gradient(batch, pairs, anchor, valid, total)
            parts.append(part)
        return self._gradient(parts)

    def _shard_gradient(
        self,
        batch: UpdateBatch,
        pairs: Pairs,
        anchor: Anchor,
        valid: int,
        totals: Totals,
        plain: bool = False,
    ) -> list[Tensor]:
        """Gradient of the shard's summed loss, divided by the minibatch's count of valid pairs.

        `plain`: neither clipped nor levelled.
        """
        trajectory = batch.trajectory
        reference = self._reference(trajectory, np.unique(pairs.sample))

        def loss(part: Pairs, prepared: Prepared, where: np.ndarray) -> Tensor:
            mean, step = self.likelihood.mean(trajectory, part, prepared, where)
            log_prob = self.likelihood.density(trajectory, part, step, mean)
            anchored = to_device(anchor.log_probs[part.sample, part.step], self.backbone.device)
            result = self._surrogate(batch, part, step, mean, log_prob, anchored, anchor, plain)
            total, kl = result.loss.sum(), None
            if reference is not None:
                with torch.no_grad(), self.adapter.disabled():
                    base, _ = self.likelihood.mean(trajectory, part, reference, where)
                kl = self.process.kl(step, mean, base)
                total = total + self.config.ppo.kl_weight * kl.sum()
            totals.add(result, kl, torch.expm1(log_prob.detach() - anchored))
            return total / valid

        return gradient_of(
            self.likelihood,
            self.parameters,
            trajectory,
            pairs,
            loss,
            microbatch_size=self.microbatch_size,
            scale=loss_scale(valid, self.backbone.latent_shape) * self.scale_factor,
        )

    def _surrogate(
        self,
        batch: UpdateBatch,
        part: Pairs,
        step: Tensor,
        mean: Tensor,
        log_prob: Tensor,
        anchored: Tensor,
        anchor: Anchor,
        plain: bool,
    ) -> ppo.PpoLoss:
        objective, device = self.config.ppo, self.backbone.device
        advantages = torch.from_numpy(batch.advantages[part.sample + batch.first])
        advantage = to_device(advantages.float(), device)
        if plain:
            return ppo.clipped_loss(log_prob, anchored, advantage, math.inf)
        weight = None
        if self.config.uses_decoupled:
            weight = to_device(anchor.weight[part.sample, part.step], device)
        if (level := self.level) is not None:
            weight = level[step] * (1.0 if weight is None else weight)
        divergence = None
        if objective.needs_means:
            old = anchor.mean(self.likelihood, batch.trajectory, part)
            divergence = self.process.kl(step, mean, old)
        sigma = self.process.sigma[step]
        return surrogate(objective, log_prob, anchored, advantage, sigma, weight, divergence)

    @torch.no_grad()
    def _reference(self, trajectory: Trajectory, rows: np.ndarray) -> Prepared | None:
        """The prompts as the base policy encodes them, if a KL to it is configured."""
        if not self.config.ppo.kl_weight:
            return None
        with self.adapter.disabled():
            return self.backbone.prepare(self.likelihood.encode(trajectory, rows)[0])


def trained_steps(config: Config, process: Process, iteration: int, count: int) -> np.ndarray:
    """The steps that PPO trains on, for each of the iteration's N samples: int64 [N, K]."""
    steps = candidate_steps(config, process).tolist()
    return randomness.trained_steps(config.seed, iteration, count, steps, config.trained_timesteps)


def candidate_steps(config: Config, process: Process) -> np.ndarray:
    """The steps that PPO may train on: int64."""
    steps = process.trainable
    if config.diffusion.window is not None:
        first, end = config.diffusion.window_range
        return np.asarray([i for i in steps if first <= i < end], dtype=np.int64)
    if config.ppo.timestep_choice == "first":
        steps = steps[: config.trained_timesteps]
    return np.asarray(steps, dtype=np.int64)


def _stored(trajectory: Trajectory, pairs: Pairs) -> Tensor:
    return torch.from_numpy(trajectory.log_probs[pairs.sample, pairs.step])
