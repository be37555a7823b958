"""The policy update: trajectories and advantages in, a better adapter out. No Ray.

The gradient of a minibatch takes one encoder pass. Each distinct prompt's cross-attention keys and
values are cut off from the encoder, their gradient is gathered over all samples and timesteps
through the U-Net, and one backward pass carries it into the adapter: the same gradient as plain
autograd's, with T - 1 fewer encoder passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from texforce_ray import randomness
from texforce_ray.config import Config
from texforce_ray.diffusion import ddim
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.errors import NumericsError
from texforce_ray.model.backbone import Backbone, Prepared
from texforce_ray.model.snapshot import PolicySnapshot
from texforce_ray.rl import ppo
from texforce_ray.rl.likelihood import Likelihood, Pairs
from texforce_ray.rl.trainer import Trainer, UpdateBatch


class Learner(Trainer):
    """PPO on the text encoder's LoRA adapter, the U-Net's, or both."""

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
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
            len(batch.trajectory),
            self._trainable_steps(),
            config.trained_timesteps,
        )
        parts = self._minibatches(batch, epoch=0)
        error = self._ratio_error(batch, Pairs.of(parts[0], steps), behaviour)
        if not error <= config.max_ratio_error:
            raise NumericsError(
                f"learner and sampler disagree: |ratio - 1| = {error:.2e} on the first pass of "
                f"iteration {self.version}, allowed is {config.max_ratio_error:.0e} "
                "(ppo.max_ratio_error). Use float32 for model.dtype and diffusion.storage_dtype, "
                "or set ppo.decoupled=always and a larger bound"
            )
        anchor = torch.from_numpy(np.array(batch.trajectory.log_probs))
        weight = torch.ones_like(anchor)
        if config.decoupled:
            anchor, weight = self._proximal(batch, steps, anchor)
        totals = _Totals()
        for epoch in range(config.ppo.epochs):
            for rows in self._minibatches(batch, epoch):
                self._step(batch, rows, steps, anchor, weight, totals)
        self.version += 1
        return totals.metrics() | {
            "ppo/ratio_error_first_pass": error,
            **self._rates(),
        }

    def _trainable_steps(self) -> list[int]:
        steps = self.table.trainable
        first = self.config.ppo.timestep_choice == "first"
        return steps[: self.config.trained_timesteps] if first else steps

    def _ratio_error(
        self, batch: UpdateBatch, pairs: Pairs, behaviour: PolicySnapshot | None
    ) -> float:
        own = self.adapter.snapshot(self.version)
        if behaviour is not None:
            self.adapter.load(behaviour)
        log_probs = self.likelihood.log_probs(batch.trajectory, pairs)
        if behaviour is not None:
            self.adapter.load(own)
        return ppo.ratio_error(log_probs.cpu(), _stored(batch.trajectory, pairs))

    def _proximal(
        self, batch: UpdateBatch, steps: np.ndarray, stored: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the current policy, and decoupled PPO's weights: [N, T] each."""
        anchor = stored.clone()
        pairs = Pairs.of(np.arange(len(batch.trajectory)), steps)
        anchor[pairs.sample, pairs.step] = self.likelihood.log_probs(batch.trajectory, pairs).cpu()
        return anchor, ppo.behaviour_weight(anchor, stored, self.config.ppo.behaviour_cap)

    def _step(
        self,
        batch: UpdateBatch,
        rows: np.ndarray,
        steps: np.ndarray,
        anchor: Tensor,
        weight: Tensor,
        totals: _Totals,
    ) -> None:
        """One optimizer update on the samples `rows`."""
        valid = int(batch.mask[rows].sum()) * steps.shape[1]
        gradient = self._no_gradient()
        for kept in self._shards(batch, rows):
            pairs = Pairs.of(kept, steps)
            parts = self._shard_gradient(batch, pairs, anchor, weight, valid, totals)
            gradient = [g + part for g, part in zip(gradient, parts, strict=True)]
        totals.grad_norms.append(self._apply(gradient))

    def _shard_gradient(
        self,
        batch: UpdateBatch,
        pairs: Pairs,
        anchor: Tensor,
        weight: Tensor,
        valid: int,
        totals: _Totals,
    ) -> list[Tensor]:
        """Gradient of the shard's summed loss, divided by the minibatch's count of valid pairs."""
        trajectory, device = batch.trajectory, self.backbone.device
        rows, local = np.unique(pairs.sample, return_inverse=True)
        with torch.enable_grad():
            conditioning, prompt = self.likelihood.encode(trajectory, rows)
            prepared = self.backbone.prepare(conditioning)
            leaf = prepared.map(lambda t: t.detach().requires_grad_(t.requires_grad))
            reference = self._reference(trajectory, rows)
            for parameter in self.parameters:
                parameter.grad = None
            for chunk in pairs.chunks(self.config.learner.microbatch_size):
                part, where = pairs[chunk], prompt[local[chunk]]
                mean, step = self.likelihood.mean(trajectory, part, leaf, where)
                log_prob = self.likelihood.density(trajectory, part, step, mean)
                index = (torch.from_numpy(part.sample), torch.from_numpy(part.step))
                result = ppo.clipped_loss(
                    log_prob,
                    anchor[index].to(device),
                    torch.from_numpy(batch.advantages[part.sample]).float().to(device),
                    self.config.ppo.clip_range,
                    weight[index].to(device) if self.config.decoupled else None,
                )
                loss = result.loss.sum()
                if reference is not None:
                    with torch.no_grad(), self.adapter.disabled():
                        base, _ = self.likelihood.mean(trajectory, part, reference, where)
                    kl = ddim.step_kl(self.table, step, mean, base)
                    loss = loss + self.config.ppo.kl_weight * kl.sum()
                    totals.kl_base = (totals.kl_base or 0.0) + float(kl.detach().sum())
                (loss / valid).backward()
                totals.add(result)
            through = [
                (out, cut.grad)
                for out, cut in zip(prepared.tensors(), leaf.tensors(), strict=True)
                if cut.grad is not None
            ]
            direct = [p.grad for p in self.parameters]
            found: Sequence[Tensor | None] = [None] * len(direct)
            if through:
                outputs, grads = zip(*through, strict=True)
                # SDXL reads the layer before an encoder's last one: that has no gradient.
                found = torch.autograd.grad(outputs, self.parameters, grads, allow_unused=True)
            return [
                _sum(p, parts) for p, *parts in zip(self.parameters, direct, found, strict=True)
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


class _Totals:
    """Sums over all trained pairs of an iteration."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = {"ppo/loss": 0.0, "ppo/approx_kl": 0.0, "ppo/clipfrac": 0.0, "ppo/ratio": 0.0}
        self.kl_base: float | None = None  # unless it is computed
        self.grad_norms: list[float] = []

    def add(self, result: ppo.PpoLoss) -> None:
        self.count += len(result.ratio)
        columns = (result.loss.detach(), result.approx_kl, result.clipped, result.ratio)
        for name, values in zip(self.sums, columns, strict=True):
            self.sums[name] += float(values.sum())

    def metrics(self) -> dict:
        count = max(1, self.count)
        kl = {} if self.kl_base is None else {"ppo/kl_base": self.kl_base / count}
        return (
            {name: value / count for name, value in self.sums.items()}
            | kl
            | {
                "ppo/trained_pairs": self.count,
                "learner/grad_norm": float(np.mean(self.grad_norms)),
            }
        )
