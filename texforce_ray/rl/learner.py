"""The policy update: trajectories and advantages in, a better adapter out. No Ray.

The gradient of a minibatch takes one encoder pass. Each distinct prompt's cross-attention keys and
values are cut off from the encoder, their gradient is gathered over all samples and timesteps
through the U-Net, and one backward pass carries it into the adapter: the same gradient as plain
autograd's, with T - 1 fewer encoder passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from texforce_ray import randomness
from texforce_ray.config import Config
from texforce_ray.diffusion import ddim
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.errors import NumericsError
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.conditioning import Prepared
from texforce_ray.model.snapshot import PolicySnapshot
from texforce_ray.rl import ppo
from texforce_ray.rl.likelihood import Likelihood, Pairs
from texforce_ray.rl.precision import loss_scale, to_encoder
from texforce_ray.rl.trainer import Trainer, UpdateBatch

_PROBED = 4  # samples, and steps of each, whose gradient is checked in half precision


class Learner(Trainer):
    """PPO on the text encoder's LoRA adapter, the U-Net's, or both."""

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.learner.gradient_checkpointing:
            backbone.unet.enable_gradient_checkpointing()
        self.likelihood = Likelihood(
            backbone,
            self.table,
            config.diffusion.guidance_scale,
            config.learner.microbatch_size,
        )

    def update(self, batch: UpdateBatch, behaviour: PolicySnapshot | None = None) -> dict:
        config = self.config
        steps = randomness.trained_steps(
            config.seed,
            self.version,
            len(batch),
            self._trainable_steps(),
            config.trained_timesteps,
        )
        anchor = torch.from_numpy(np.array(batch.trajectory.log_probs))
        weight = torch.ones_like(anchor)
        minibatches = [
            rows for epoch in range(config.ppo.epochs) for rows in self._minibatches(batch, epoch)
        ]
        # The first one with a sample that counts.
        first = next((rows for rows in minibatches if batch.mask[rows].any()), minibatches[0])
        error: float | None = None
        if behaviour is not None:
            error = self._ratio_error(batch, first, steps, behaviour)
        if config.decoupled:
            stored = anchor
            anchor, weight, proximal_error = self._proximal(batch, steps, stored)
            if error is None:
                error = self._largest(proximal_error)
        if error is not None:
            self._check_agreement(error)
        checked = self.check_gradient(batch, lambda: self._probe(batch, first, steps))
        totals = [_Totals(self.backbone.device) for _ in self._shards(np.arange(len(batch)))]
        norms: list[float] = []
        skipped = 0
        for rows in minibatches:
            if not batch.mask[rows].any():
                self._pass_over()
                skipped += 1
                continue
            gradient = self._minibatch_gradient(batch, rows, steps, anchor, weight, totals)
            if error is None:
                # Nothing has changed since these samples were drawn: their first ratios are those
                # that have to be 1.
                error = self._largest(*(total.ratio_error for total in totals))
                self._check_agreement(error)
            if self._too_far(totals):
                break
            norms.append(self._apply(gradient))
        left_out = len(minibatches) - len(norms) - skipped
        self.version += 1
        return {
            **_mean_metrics(self._gathered([shard.row() for shard in totals])),
            **self._norm_metrics(norms),
            **({} if config.ppo.target_kl is None else {"ppo/updates_left_out": left_out}),
            "ppo/ratio_error_first_pass": 0.0 if error is None else error,
            **checked,
            **self._rates(),
        }

    def _trainable_steps(self) -> list[int]:
        steps = self.table.trainable
        first = self.config.ppo.timestep_choice == "first"
        return steps[: self.config.trained_timesteps] if first else steps

    def _check_agreement(self, error: float) -> None:
        allowed = self.config.max_ratio_error
        if not error <= allowed:
            raise NumericsError(
                f"learner and sampler disagree: |ratio - 1| = {error:.2e} on the first pass of "
                f"iteration {self.version}, allowed is {allowed:.0e} (ppo.max_ratio_error). Use "
                "float32 for model.dtype and diffusion.storage_dtype, or set ppo.decoupled=always "
                "and a larger bound"
            )

    def _too_far(self, totals: Sequence[_Totals]) -> bool:
        """Whether the minibatch's approx_kl exceeds the target, over all learners."""
        target = self.config.ppo.target_kl
        if target is None:
            return False
        count, kl = self._gathered([total.take_kl() for total in totals]).sum(axis=0)
        # A batch that is not finite is not "too far": its update is left out and counted.
        return bool(np.isfinite(kl)) and kl > target * max(1.0, count)

    def _largest(self, *errors: float) -> float:
        """The largest of all learners' numbers."""
        return float(self._gathered([[error] for error in errors]).max())

    def _ratio_error(
        self, batch: UpdateBatch, rows: np.ndarray, steps: np.ndarray, behaviour: PolicySnapshot
    ) -> float:
        """Largest |r - 1| on samples `rows`, with the weights that sampled them."""
        own = self.adapter.snapshot(self.version)
        self.adapter.load(behaviour)
        errors = []
        for shard in self._shards(rows):
            pairs = Pairs.of(shard[batch.mask[shard]], steps, batch.first)
            log_probs = self.likelihood.log_probs(batch.trajectory, pairs).cpu()
            errors.append(ppo.ratio_error(log_probs, _stored(batch.trajectory, pairs)))
        self.adapter.load(own)
        return self._largest(*errors)

    def _proximal(
        self, batch: UpdateBatch, steps: np.ndarray, stored: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Log-probabilities of the current policy, decoupled PPO's weights, largest |r - 1|.

        The first two are [n, T], and mean something at trained pairs alone: a step with sigma = 0
        has no likelihood, and a masked sample enters no number.
        """
        anchor, error = stored.clone(), 0.0
        for shard in self._shards(np.arange(len(batch))):
            pairs = Pairs.of(shard[batch.mask[shard]], steps, batch.first)
            found = self.likelihood.log_probs(batch.trajectory, pairs).cpu()
            # Not max(): of a number and NaN it may give either.
            error = float(
                np.maximum(error, ppo.ratio_error(found, _stored(batch.trajectory, pairs)))
            )
            anchor[pairs.sample, pairs.step] = found
        weight = ppo.behaviour_weight(anchor, stored, self.config.ppo.behaviour_cap)
        return anchor, weight, error

    def _probe(self, batch: UpdateBatch, rows: np.ndarray, steps: np.ndarray) -> list[Tensor]:
        """The gradient of a few of this learner's pairs: what `check_gradient` compares.

        Of the plain policy gradient: which pairs PPO clips depends on rounding, and advantages may
        all be 0.
        """
        kept = np.concatenate(self._shards(rows))
        kept = kept[batch.mask[kept]][:_PROBED]
        if not len(kept):
            return [torch.zeros_like(p) for p in self.parameters]
        spread = np.linspace(0, steps.shape[1] - 1, min(_PROBED, steps.shape[1])).round()
        pairs = Pairs.of(kept, steps[:, spread.astype(np.int64)], batch.first)
        anchor = torch.from_numpy(np.array(batch.trajectory.log_probs))
        found = self.likelihood.log_probs(batch.trajectory, pairs, self.microbatch_size)
        anchor[pairs.sample, pairs.step] = found.cpu()
        # The valid pairs of the whole minibatch: they decide how small its gradient is.
        valid = int(batch.mask[rows].sum()) * steps.shape[1]
        return self._shard_gradient(
            replace(batch, advantages=np.ones(len(batch))),
            pairs,
            anchor,
            torch.ones_like(anchor),
            valid,
            _Totals(self.backbone.device),
            clip_range=math.inf,
        )

    def _minibatch_gradient(
        self,
        batch: UpdateBatch,
        rows: np.ndarray,
        steps: np.ndarray,
        anchor: Tensor,
        weight: Tensor,
        totals: Sequence[_Totals],
    ) -> list[Tensor]:
        """The gradient of the loss over the samples `rows`, of all learners' shards."""
        valid = int(batch.mask[rows].sum()) * steps.shape[1]
        parts: list[list[Tensor] | None] = []
        for shard, total in zip(self._shards(rows), totals, strict=True):
            kept = shard[batch.mask[shard]]
            pairs = Pairs.of(kept, steps, batch.first)
            found = None
            if len(kept):
                found = self._shard_gradient(batch, pairs, anchor, weight, valid, total)
            parts.append(found)
        return self._gradient(parts)

    def _shard_gradient(
        self,
        batch: UpdateBatch,
        pairs: Pairs,
        anchor: Tensor,
        weight: Tensor,
        valid: int,
        totals: _Totals,
        clip_range: float | None = None,
    ) -> list[Tensor]:
        """Gradient of the shard's summed loss, divided by the minibatch's count of valid pairs."""
        trajectory, device = batch.trajectory, self.backbone.device
        scale = loss_scale(valid, self.backbone.latent_shape) * self.scale_factor
        clip_range = self.config.ppo.clip_range if clip_range is None else clip_range
        rows, local = np.unique(pairs.sample, return_inverse=True)
        with torch.enable_grad():
            conditioning, prompt = self.likelihood.encode(trajectory, rows)
            prepared = self.backbone.prepare(conditioning)
            # In float32, so that gradients of all pairs add up in float32.
            leaf = prepared.map(lambda t: t.detach().float().requires_grad_(t.requires_grad))
            reference = self._reference(trajectory, rows)
            for parameter in self.parameters:
                parameter.grad = None
            for chunk in pairs.chunks(self.microbatch_size):
                part, where = pairs[chunk], prompt[local[chunk]]
                mean, step = self.likelihood.mean(trajectory, part, leaf, where)
                log_prob = self.likelihood.density(trajectory, part, step, mean)
                index = (torch.from_numpy(part.sample), torch.from_numpy(part.step))
                result = ppo.clipped_loss(
                    log_prob,
                    anchor[index].to(device),
                    torch.from_numpy(batch.advantages[part.sample + batch.first])
                    .float()
                    .to(device),
                    clip_range,
                    weight[index].to(device) if self.config.decoupled else None,
                )
                loss, kl = result.loss.sum(), None
                if reference is not None:
                    with torch.no_grad(), self.adapter.disabled():
                        base, _ = self.likelihood.mean(trajectory, part, reference, where)
                    kl = ddim.step_kl(self.table, step, mean, base)
                    loss = loss + self.config.ppo.kl_weight * kl.sum()
                (loss / valid * scale).backward()
                totals.add(result, kl)
            through = [
                (out, cut.grad)
                for out, cut in zip(prepared.tensors(), leaf.tensors(), strict=True)
                if cut.grad is not None
            ]
            direct = [p.grad for p in self.parameters]
            found: Sequence[Tensor | None] = [None] * len(direct)
            shift = 0
            if through:
                outputs, sums = zip(*through, strict=True)
                scaled, shift = to_encoder(sums, outputs)
                # SDXL reads the layer before an encoder's last one: that has no gradient.
                found = torch.autograd.grad(outputs, self.parameters, scaled, allow_unused=True)
            back = 2.0**-shift
            found = [None if gradient is None else gradient * back for gradient in found]
            return [
                _sum(p, parts) / scale
                for p, *parts in zip(self.parameters, direct, found, strict=True)
            ]

    @torch.no_grad()
    def _reference(self, trajectory: Trajectory, rows: np.ndarray) -> Prepared | None:
        """The prompts as the base policy sees them, where a KL to it is asked for."""
        if not self.config.ppo.kl_weight:
            return None
        with self.adapter.disabled():
            return self.backbone.prepare(self.likelihood.encode(trajectory, rows)[0])


def _sum(parameter: Tensor, parts: Sequence[Tensor | None]) -> Tensor:
    """A parameter's gradient from wherever some comes."""
    known = [part for part in parts if part is not None]
    return torch.stack(known).sum(0) if known else torch.zeros_like(parameter)


def _stored(trajectory: Trajectory, pairs: Pairs) -> Tensor:
    return torch.from_numpy(trajectory.log_probs[pairs.sample, pairs.step])


_METRICS = ("ppo/loss", "ppo/approx_kl", "ppo/clipfrac", "ppo/ratio", "ppo/kl_base")


class _Totals:
    """Sums over the pairs of one shard that an iteration trained on.

    Kept on the device: to read a number there is to wait for all work before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self._sums = torch.zeros(len(_METRICS), dtype=torch.float64, device=device)
        self._kl = torch.zeros((), dtype=torch.float64, device=device)  # since it was last taken
        self._error = torch.zeros((), device=device)
        self._taken = 0  # the count then

    @torch.no_grad()
    def add(self, result: ppo.PpoLoss, kl_base: Tensor | None) -> None:
        self.count += len(result.ratio)
        self._error = torch.maximum(self._error, (result.ratio - 1).abs().max())
        # NaN, and so left out of the metrics, unless it is computed.
        kl = torch.full_like(result.ratio, float("nan")) if kl_base is None else kl_base
        columns = (result.loss, result.approx_kl, result.clipped, result.ratio, kl)
        self._sums += torch.stack([column.sum() for column in columns]).double()
        self._kl += result.approx_kl.sum()

    def take_kl(self) -> list[float]:
        """Count and sum of approx_kl since the last call."""
        taken = [float(self.count - self._taken), float(self._kl)]
        self._taken = self.count
        self._kl.zero_()  # not a difference of sums: one NaN would be in all that follow
        return taken

    @property
    def ratio_error(self) -> float:
        """Largest |r - 1| so far."""
        return float(self._error)

    def row(self) -> list[float]:
        return [float(self.count), *self._sums.tolist()]


def _mean_metrics(rows: np.ndarray) -> dict:
    """Means over all pairs of all shards, given their counts and sums: float64 [S, 1 + M]."""
    count, *sums = rows.sum(axis=0)
    means = {name: float(s / max(1.0, count)) for name, s in zip(_METRICS, sums, strict=True)}
    known = {name: value for name, value in means.items() if not np.isnan(value)}
    return known | {"ppo/trained_pairs": int(count)}
