"""What every policy update shares: adapter, optimizer, exact state. No Ray.

`rl.learner` trains with PPO, `rl.direct` through a differentiable reward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from texforce_ray import randomness
from texforce_ray.config import Config
from texforce_ray.diffusion import ddim
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.errors import ConfigError, NumericsError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.lora_layers import rescaled
from texforce_ray.model.snapshot import TEXT_ENCODERS, UNET, LearnerState, LoraShape, PolicySnapshot
from texforce_ray.rl.group import Alone
from texforce_ray.rl.precision import Agreement, agreement, probed_in_float32

_OTHER_SCALE = 2.0**-6


@dataclass(frozen=True)
class UpdateBatch:
    """One iteration's data: float64 [N] advantages, bool [N] mask (True: use), trajectories.

    Of several learners, each has the trajectories of its own shards only: those of the samples
    from `first` on. Samples are numbered from 0 to N - 1 all the same.
    """

    trajectory: Trajectory
    advantages: np.ndarray
    mask: np.ndarray
    first: int = 0

    def __len__(self) -> int:
        return len(self.mask)


class Trainer(ABC):
    """Adapter and optimizer of a policy; subclasses compute the gradient."""

    def __init__(self, backbone: Backbone, config: Config) -> None:
        self.backbone, self.config = backbone, config
        self.group: Alone = Alone()
        self.table = ddim.step_table(
            backbone.scheduler, config.diffusion.steps, config.diffusion.eta
        ).to(backbone.device)
        if not self.table.trainable:
            raise ConfigError(
                f"diffusion.steps: {config.diffusion.steps} steps of this model's scheduler add no "
                "noise at all, so none has a likelihood to train on; use more steps"
            )
        self.adapter = Adapter(backbone, adapter_shapes(config, backbone), config.seed)
        self.parameters = self.adapter.parameters()
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                {"params": part.parameters(), "peak": _peak(config, name)}
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
        # Further factor of the loss in the backward pass; only the gradient check changes it.
        self.scale_factor = 1.0
        self.checked = False  # whether the gradient check is done, or not wanted

    # ---- state ---------------------------------------------------------------------------

    def snapshot(self) -> PolicySnapshot:
        return self.adapter.snapshot(self.version)

    def evaluation_snapshot(self) -> PolicySnapshot:
        """What is evaluated and exported: the averaged adapter if there is one."""
        if not self.ema:
            return self.snapshot()
        with self._weights(self.ema):
            return self.snapshot()

    def state(self) -> LearnerState:
        """Everything that the next update depends on, as copies."""
        moments = {
            f"{i}/{key}": value.detach().cpu().numpy().copy()
            for i, p in enumerate(self.parameters)
            for key, value in self.optimizer.state[p].items()
        }
        ema = {"parameters": {str(i): t.cpu().numpy().copy() for i, t in enumerate(self.ema)}}
        adapters = self.adapter.snapshot(self.version).adapters
        return LearnerState(
            self.version, self.updates, adapters, moments, ema if self.ema else {}, self.skipped
        )

    def load(self, state: LearnerState) -> None:
        """Continue from `state`, exactly."""
        self.version, self.updates, self.skipped = state.version, state.updates, state.skipped
        self.adapter.load_weights(state.adapters)
        self.optimizer.state.clear()
        for key, value in state.optimizer.items():
            index, _, name = key.partition("/")
            parameter = self.parameters[int(index)]
            # Adam keeps its step counter on the CPU, the moments beside their parameter.
            device = "cpu" if name == "step" else parameter.device
            self.optimizer.state[parameter][name] = torch.from_numpy(np.array(value)).to(device)
        for i, tensor in enumerate(self.ema):
            tensor.copy_(torch.from_numpy(np.array(state.ema["parameters"][str(i)])))

    def begin_from(self, snapshot: PolicySnapshot) -> None:
        """Start at another run's adapter, its scale put into B where it is not this policy's.

        Raises:
            ConfigError: other parts, layers or ranks than this policy's.
        """
        try:
            self.adapter.load(rescaled(snapshot, self.adapter.shapes))
        except ConfigError as error:
            raise ConfigError(
                f"lora.init: {error}; lora.rank and lora.unet.rank can be set to an adapter's, and "
                "texforce_ray.fuse --rank compresses one"
            ) from None
        for average, parameter in zip(self.ema, self.parameters, strict=False):
            average.copy_(parameter.detach())

    @contextmanager
    def _weights(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Within it, the adapter's parameters hold other values."""
        own = [p.detach().clone() for p in self.parameters]
        try:
            self._set(weights)
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, weights: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, weights, strict=True):
            parameter.copy_(value)

    # ---- updates -------------------------------------------------------------------------

    @abstractmethod
    def update(self, batch: UpdateBatch, behaviour: PolicySnapshot | None = None) -> dict:
        """All epochs and minibatches of one iteration.

        Args:
            batch: the iteration's samples.
            behaviour: the snapshot that sampled them, where that is not the current policy.

        Returns:
            Metrics by the field's names.

        Raises:
            NumericsError: gradients or weights that are not finite, or numbers that disagree with
                the sampler.
        """

    def check_gradient(
        self, batch: UpdateBatch, probe: Callable[[], list[Tensor]]
    ) -> dict[str, float]:
        """Compare a small gradient in half precision with the same in float32, once in a run.

        Where float32 weights do not fit beside, with the same under another loss scale: what
        underflows or overflows differs there.

        Args:
            batch: the first update's.
            probe: computes the gradient of a few of its samples.

        Returns:
            `learner/gradient_agreement` (cosine) and `learner/gradient_zeros` (share of entries
            lost to zero), the worst over all learners; nothing where all is float32 or was checked
            before.

        Raises:
            NumericsError: the gradient is not the gradient.
        """
        half = self.backbone.dtype in (torch.float16, torch.bfloat16)
        if not half or self.checked or self.optimizer.state or not batch.mask.any():
            return {}
        self.checked = True
        self.microbatch_size = 1  # float32 takes twice the memory of what was planned for
        try:
            found, beside = probe(), "float32"
            exact = probed_in_float32(self.backbone, probe)
            if exact is None:
                self.scale_factor, beside = _OTHER_SCALE, "another loss scale"
                exact = probe()
        finally:
            self.scale_factor, self.microbatch_size = 1.0, self.config.learner.microbatch_size
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()  # others may share the device, and nobody needs that again
        own = agreement(found, exact)
        if beside == "float32" and not any(bool(t.any()) for t in exact):
            own = Agreement(1.0, 0.0)  # these samples really have none: all masked, say
        # The worst of all learners.
        lost, zeros = self._gathered([[1 - own.cosine, own.zeros]] * self._own_shards()).max(axis=0)
        least = self.config.learner.min_gradient_agreement
        if not 1 - lost >= least:
            raise NumericsError(
                f"the gradient in {self.config.model.dtype} is not the gradient: its cosine to "
                f"that of {beside} is {1 - lost:.3f}, {zeros:.0%} of its entries are lost to zero "
                f"(learner.min_gradient_agreement allows a cosine of {least}). Use "
                f"model.dtype={'bfloat16 or ' * (self.backbone.dtype == torch.float16)}float32"
            )
        return {"learner/gradient_agreement": 1 - lost, "learner/gradient_zeros": zeros}

    def _own_shards(self) -> int:
        return self.config.learner.gradient_shards // self.group.size

    def _minibatches(self, batch: UpdateBatch, epoch: int) -> list[np.ndarray]:
        config = self.config
        return randomness.minibatches(
            config.seed,
            self.version,
            epoch,
            len(batch),
            config.ppo.num_minibatches,
            config.learner.gradient_shards,
        )

    def _shards(self, rows: np.ndarray) -> list[np.ndarray]:
        """The parts of `rows` (of a minibatch, or of all samples) that this learner computes.

        Whoever computes the parts' gradients, their sum rounds alike: parts and order are fixed.
        """
        shards = np.split(rows, self.config.learner.gradient_shards)
        own = len(shards) // self.group.size
        return shards[self.group.rank * own : (self.group.rank + 1) * own]

    def _gradient(self, parts: Sequence[Sequence[Tensor] | None]) -> list[Tensor]:
        """The sum over all learners' shards, in order; None where all of a shard was masked."""
        nothing = [torch.zeros_like(p) for p in self.parameters]
        own = torch.stack([torch.cat([t.reshape(-1) for t in part or nothing]) for part in parts])
        total = torch.zeros_like(own[0])
        for shard in self.group.gather(own):
            total += shard
        sizes = [p.numel() for p in self.parameters]
        pieces = zip(total.split(sizes), self.parameters, strict=True)
        return [piece.view_as(p) for piece, p in pieces]

    def _gathered(self, own: Sequence[Sequence[float]]) -> np.ndarray:
        """One row of numbers for each own shard, to those of all shards: float64 [S, M]."""
        device = self.backbone.device
        return (
            self.group.gather(torch.tensor(own, dtype=torch.float64, device=device)).cpu().numpy()
        )

    def _apply(self, gradient: Sequence[Tensor]) -> float:
        """One optimizer update; returns the gradient's norm before it is clipped.

        An update whose gradient is not finite is left out, and its norm is NaN.

        Raises:
            NumericsError: one too many of those in a row, or weights that are not finite.
        """
        for parameter, value in zip(self.parameters, gradient, strict=True):
            parameter.grad = value
        o = self.config.optimizer
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, o.max_grad_norm)
        if not torch.isfinite(norm):
            self._skip(float(norm))
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
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):
            raise NumericsError(self._trouble("its weights are not finite"))
        return float(norm)

    def _pass_over(self) -> None:
        """A minibatch without a sample that counts: no optimizer step, no decay, no momentum."""
        self.updates += 1  # the schedule goes on

    def _skip(self, norm: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1  # the schedule goes on
        self.skipped += 1
        if self.skipped > self.config.ppo.max_skipped:
            raise NumericsError(
                self._trouble(f"{self.skipped} updates in a row had a gradient of norm {norm}")
            )

    def _trouble(self, what: str) -> str:
        return (
            f"training went wrong at update {self.updates}, iteration {self.version}: {what}. "
            f"The last checkpoint is sound; the samples are in "
            f"samples/iteration-{self.version:05d}.parquet. Resume with a smaller optimizer.lr or "
            "a ppo.kl_weight, or use model.dtype=float32"
        )

    def _norm_metrics(self, norms: Sequence[float]) -> dict[str, float]:
        """Mean gradient norm, and how many updates were left out."""
        known = [norm for norm in norms if np.isfinite(norm)]
        return {
            "learner/grad_norm": float(np.mean(known)) if known else 0.0,
            "learner/skipped": len(norms) - len(known),
        }

    def _rates(self) -> dict[str, float]:
        return {"learner/lr": self.optimizer.param_groups[0]["lr"], "learner/updates": self.updates}


def adapter_shapes(config: Config, backbone: Backbone) -> dict[str, LoraShape]:
    """The trained parts and their adapters' shapes; `text_encoder` means all that there are."""
    lora = config.lora
    shapes: dict[str, LoraShape] = {}
    if lora.text_encoder:
        shape = LoraShape(lora.rank, lora.alpha, lora.target_modules)
        shapes |= {part: shape for part in backbone.parts() if part in TEXT_ENCODERS}
    if lora.unet is not None:
        shapes[UNET] = LoraShape(lora.unet.rank, lora.unet.alpha, lora.unet.target_modules)
    return shapes


def _peak(config: Config, part: str) -> float:
    """A part's peak learning rate."""
    own = config.lora.unet.lr if part == UNET and config.lora.unet else None
    return own or config.optimizer.lr


def learning_rate_factor(update: int, total: int, warmup_fraction: float, schedule: str) -> float:
    """Linear warm-up over the first share of updates, then cosine to 0 or constant."""
    warmup = round(total * warmup_fraction)
    if update < warmup:
        return (update + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (update - warmup) / max(1, total - warmup)
    return 0.5 * (1 + float(np.cos(np.pi * min(1.0, progress))))
