"""What every policy update shares: adapter, optimizer, exact state. No Ray.

Each objective is a subclass: see `rl.objectives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from texforce_ray.artifacts.snapshot import PolicySnapshot
from texforce_ray.config import Config
from texforce_ray.diffusion.denoiser import Denoiser
from texforce_ray.diffusion.process import Process
from texforce_ray.diffusion.window import process_at
from texforce_ray.errors import ConfigError, NumericsError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.flops import PassFlops
from texforce_ray.rl.adapters import adapter_shapes, learning_rate_factor, peak_rate
from texforce_ray.rl.exact_state import ExactState
from texforce_ray.rl.group import SoloGroup
from texforce_ray.rl.likelihood import Likelihood
from texforce_ray.rl.precision import compare
from texforce_ray.rl.sharding import Sharding, UpdateBatch

PROBED = 2  # samples whose gradient is checked in half precision


class Learner(ExactState, Sharding):
    """Adapter and optimizer of a policy; subclasses are objectives and compute the gradient."""

    def __init__(self, backbone: Backbone, config: Config) -> None:
        self.backbone, self.config = backbone, config
        self.group: SoloGroup = SoloGroup()
        d = config.diffusion
        process = backbone.process(d.steps, d.eta, d.kernel)
        self._denoiser = Denoiser(backbone, process, d.guidance_scale)
        self._process_at: dict[int, Process] = {}
        if self.needs_likelihood and not process.trainable:
            if not d.eta:
                raise ConfigError("diffusion.eta: 0 samples without noise: there is no likelihood")
            raise ConfigError(
                f"diffusion.steps: {config.diffusion.steps} steps of this model's scheduler add no "
                "noise at all, so none has a likelihood to train on; use more steps"
            )
        self.adapter = Adapter(backbone, adapter_shapes(config, backbone), config.seed)
        self.parameters = self.adapter.parameters()
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                {"params": part.parameters(), "peak": peak_rate(config, backbone, name)}
                for name, part in self.adapter.parts.items()
            ],
            lr=o.lr,
            betas=o.betas,
            weight_decay=o.weight_decay,
            eps=o.eps,
        )
        self.ema = [p.detach().clone() for p in self.parameters] if o.ema_decay else []
        self.version = 0
        self.updates = 0
        self.skipped = 0  # in a row
        self.microbatch_size = config.learner.microbatch_size
        # Extra factor of the loss in the backward pass; only the gradient check changes it.
        self.scale_factor = 1.0
        self.checked = False  # whether the gradient check is done or not wanted

    @property
    def denoiser(self) -> Denoiser:
        """The policy at one step of the current iteration's process."""
        return replace(self._denoiser, process=self.process)

    @property
    def process(self) -> Process:
        """The process that sampled the current iteration."""
        if self.version not in self._process_at:
            process = process_at(self.config, self._denoiser.process, self.version)
            self._process_at = {self.version: process}
        return self._process_at[self.version]

    def _likelihood(self, denoiser: Denoiser, per_sample: float) -> Likelihood:
        """Of microbatches; `per_sample`: pairs that are trained of each sample, on average."""
        most = math.ceil(self.config.shard_size * per_sample)
        return Likelihood(denoiser, self.config.learner.microbatch_size, most)

    # ---- what an objective defines --------------------------------------------------------

    # Whether a process without noise, which has no likelihood, is an error.
    needs_likelihood: bool = False

    # Names of the sums that `shard_gradient` returns besides the gradient.
    sums: tuple[str, ...] = ("count",)

    def update_flops(self, metrics: Mapping[str, float], cost: PassFlops) -> float:
        """FLOPs of the networks in the update that reported `metrics`; 0 if unknown."""
        del metrics, cost
        return 0.0

    @staticmethod
    def kept_latents(
        config: Config, process: Process, iteration: int, first: int, count: int
    ) -> np.ndarray:
        """The latents that samples `first` to `first + count - 1` of an iteration must store.

        bool [count, T + 1]; known before anything is sampled. All of them, unless an objective
        overrides it.
        """
        del config, iteration, first
        return np.ones((count, len(process) + 1), dtype=bool)

    def used(self, batch: UpdateBatch) -> np.ndarray:
        """Which of the iteration's samples can have a gradient: bool [N], all unmasked ones."""
        return batch.mask

    def shard_gradient(
        self, batch: UpdateBatch, kept: np.ndarray, valid: int
    ) -> tuple[list[Tensor], dict[str, float]]:
        """The loss's gradient over some samples of a minibatch.

        Args:
            batch: the iteration's samples.
            kept: int64 [n], n > 0: their numbers within the iteration; sample i is row
                `i - batch.first` of the trajectory.
            valid: unmasked samples in the whole minibatch; the sum over samples is divided by it.

        Returns:
            One tensor for each of `self.parameters`, and the sums that `self.sums` names.
        """
        raise NotImplementedError(f"{type(self).__name__} must define shard_gradient or update")

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics of an update, named 'group/name', from the sums over all of its samples."""
        del sums
        return {}

    def update(
        self, batch: UpdateBatch, behaviour: PolicySnapshot | None = None
    ) -> dict[str, float]:
        """All epochs and minibatches of one iteration, by `shard_gradient`.

        Args:
            batch: the iteration's samples.
            behaviour: the snapshot that sampled them, if it is not the current policy.

        Returns:
            Metrics, under the names established in the field.

        Raises:
            NumericsError: gradients or weights are not finite, or results disagree with the
                sampler's.
        """
        del behaviour
        minibatches, used = self._minibatches(batch, 0), self.used(batch)
        first = next((rows for rows in minibatches if batch.mask[rows].any()), minibatches[0])
        checked = self.check_gradient(batch, lambda: self._probed_gradient(batch, first))
        totals, norms = np.zeros(len(self.sums)), []
        for epoch in range(self.config.update.epochs):
            for rows in self._minibatches(batch, epoch):
                if not used[rows].any():
                    self._pass_over()
                    continue
                gradient, sums = self._minibatch(batch, rows)
                norms.append(self._apply(gradient))
                totals += sums
        self.version += 1
        named = dict(zip(self.sums, totals.tolist(), strict=True))
        return {**self.metrics(named), **self._norm_metrics(norms), **checked, **self._rates()}

    def _minibatch(self, batch: UpdateBatch, rows: np.ndarray) -> tuple[list[Tensor], np.ndarray]:
        """The gradient and the sums over the samples `rows`, across all learners' shards."""
        valid, used = int(batch.mask[rows].sum()), self.used(batch)
        parts: list[list[Tensor] | None] = []
        sums: list[list[float]] = []
        for shard in self._shards(rows):
            kept = shard[used[shard]]
            part, named = None, dict.fromkeys(self.sums, 0.0)
            if len(kept):
                part, named = self.shard_gradient(batch, kept, valid)
            parts.append(part)
            sums.append([named[name] for name in self.sums])
        return self._gradient(parts), self._gathered(sums).sum(axis=0)

    def _probed_gradient(self, batch: UpdateBatch, rows: np.ndarray) -> list[Tensor]:
        """The gradient of a few of this learner's samples: what `check_gradient` compares."""
        kept = np.concatenate(self._shards(rows))
        kept = kept[batch.mask[kept]][:PROBED]
        if not len(kept):
            return [torch.zeros_like(p) for p in self.parameters]
        return self.shard_gradient(batch, kept, int(batch.mask[rows].sum()))[0]

    # ---- updates -------------------------------------------------------------------------

    def check_gradient(
        self, batch: UpdateBatch, probe: Callable[[], list[Tensor]]
    ) -> dict[str, float]:
        """Compare a small gradient with float32's (`precision.compare`) before the first update.

        Args:
            batch: the first update's batch.
            probe: computes the gradient of a few of its samples.

        Returns:
            `learner/gradient_agreement` (cosine) and `learner/gradient_zeros` (share of entries
            lost to zero), the worst over all learners; empty if everything is float32 or was
            checked before.

        Raises:
            NumericsError: the gradient in half precision is unusable.
        """
        half = self.backbone.dtype in (torch.float16, torch.bfloat16)
        if not half or self.checked or self.optimizer.state or not batch.mask.any():
            return {}
        self.checked = True
        self.microbatch_size = 1  # float32 takes twice the planned memory
        try:
            own, beside = compare(self.backbone, probe, self._scaled)
        finally:
            self.microbatch_size = self.config.learner.microbatch_size
        # The worst of all learners.
        lost, zeros = self._gathered([[1 - own.cosine, own.zeros]] * self._own_shards()).max(axis=0)
        least = self.config.learner.min_gradient_agreement
        if not 1 - lost >= least:
            raise NumericsError(
                f"the gradient in {self.config.model.dtype} is unusable: its cosine to that of "
                f"{beside} is {1 - lost:.3f}, {zeros:.0%} of its entries are lost to zero "
                f"(learner.min_gradient_agreement requires a cosine of at least {least}); use "
                f"model.dtype={'bfloat16 or ' * (self.backbone.dtype == torch.float16)}float32"
            )
        return {"learner/gradient_agreement": 1 - lost, "learner/gradient_zeros": zeros}

    @contextmanager
    def _scaled(self, factor: float) -> Iterator[None]:
        """Temporarily give the loss an extra factor in the backward pass."""
        self.scale_factor = factor
        try:
            yield
        finally:
            self.scale_factor = 1.0

    def _apply(self, gradient: Sequence[Tensor]) -> float:
        """One optimizer update; returns the gradient's norm before it is clipped.

        An update whose gradient is not finite is skipped, and its norm is NaN.

        Raises:
            NumericsError: too many skipped updates in a row, or weights that are not finite.
        """
        for parameter, value in zip(self.parameters, gradient, strict=True):
            parameter.grad = value
        o = self.config.optimizer
        # Two reads from the device in all: each waits for everything queued before it.
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, o.max_grad_norm))
        if not math.isfinite(norm):
            self._skip(norm)
            return float("nan")
        self.skipped = 0
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(
                self.updates, self.config.total_updates, o.warmup_fraction, o.schedule
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        for average, parameter in zip(self.ema, self.parameters, strict=False):
            average.lerp_(parameter.detach(), 1 - (o.ema_decay or 0))
        if not torch.stack([torch.isfinite(p).all() for p in self.parameters]).all():
            raise NumericsError(self._trouble("the adapter's weights are not finite"))
        return norm

    def _pass_over(self) -> None:
        """Count a minibatch without a gradient: no optimizer step, no decay, no momentum."""
        self.updates += 1  # the schedule still advances

    def _skip(self, norm: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1  # the schedule still advances
        self.skipped += 1
        if self.skipped > self.config.update.max_skipped:
            raise NumericsError(
                self._trouble(f"{self.skipped} updates in a row had a gradient of norm {norm}")
            )

    def _trouble(self, what: str) -> str:
        return (
            f"training failed at update {self.updates}, iteration {self.version}: {what}; "
            f"the last checkpoint is intact, and the samples are in "
            f"samples/iteration-{self.version:05d}.parquet; resume with a smaller optimizer.lr, "
            "a larger objective.kl_weight or anchor_weight, or use model.dtype=float32"
        )

    def _norm_metrics(self, norms: Sequence[float]) -> dict[str, float]:
        """Mean gradient norm, and the number of skipped updates."""
        finite = [norm for norm in norms if np.isfinite(norm)]
        return {
            "learner/grad_norm": float(np.mean(finite)) if finite else 0.0,
            "learner/skipped": len(norms) - len(finite),
        }

    def _rates(self) -> dict[str, float]:
        return {"learner/lr": self.optimizer.param_groups[0]["lr"], "learner/updates": self.updates}
