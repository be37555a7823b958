"""Objectives on the forward process: no likelihood, any solver, one stored latent per sample.

A finished sample x0 is noised again to some levels of the process, x = forward(x0, noise), and the
policy's output there is compared with what would lead back to x0. Guidance plays no part. With
`max_staleness=1` samples are one version older; none of these objectives corrects for that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from pydantic import ValidationError
from torch import Tensor

from texforce_ray import randomness
from texforce_ray.artifacts.snapshot import DENOISERS
from texforce_ray.config import Config, CustomObjective
from texforce_ray.config.learning import ForwardObjective
from texforce_ray.diffusion.process import Process
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.conditioning import Conditioning, Prepared
from texforce_ray.model.flops import PassFlops
from texforce_ray.model.transfer import to_device
from texforce_ray.rl.learner import PROBED, Learner
from texforce_ray.rl.likelihood import Pairs
from texforce_ray.rl.precision import loss_scale
from texforce_ray.rl.sharding import UpdateBatch
from texforce_ray.rl.through_encoder import EmbeddingLoss, gradient_of


@dataclass(frozen=True)
class Noised:
    """P finished samples, noised to one level each.

    pairs: samples and levels (steps of the process). place: int64 [P], each level's place among
    its sample's. step: int64 [P]. clean, x: the finished and the noised latents. target: the output
    that leads back from x to clean. All latents are float32 [P, C, h, w].
    """

    pairs: Pairs
    place: np.ndarray
    step: Tensor
    clean: Tensor
    x: Tensor
    target: Tensor

    def error(self, output: Tensor) -> Tensor:
        """Mean square of output - target over latent dimensions: float32 [P].

        The network's own training loss in its own prediction type, unweighted.
        """
        return mean_square(output - self.target)


# The loss of each pair, float32 [P], given the policy's output there.
PairLoss = Callable[[Noised, Tensor], Tensor]


def mean_square(difference: Tensor) -> Tensor:
    """Over all dimensions but the first."""
    return difference.square().mean(dim=tuple(range(1, difference.ndim)))


class ForwardLearner(Learner):
    """What these objectives share; a subclass defines the loss of a (sample, level) pair."""

    sums: tuple[str, ...] = ("count", "error", "loss", "anchor", "embedding_anchor")
    # Passes without gradient for each trained pair, besides the anchor's; and once an iteration.
    extra_passes = 0
    first_passes = 0

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        if config.learner.gradient_checkpointing is True:
            backbone.denoiser.enable_gradient_checkpointing()
        common = _common(config, self.adapter.parts)
        self.levels = min(common.levels, len(self.process))
        self.anchor_weight = common.anchor_weight
        self.embedding_weight = common.embedding_anchor_weight
        self.likelihood = self._likelihood(
            self.denoiser.unguided(), self.levels * self.trained_share
        )

    @property
    def trained_share(self) -> float:
        """Share of the samples that can have a gradient, on average."""
        return 1.0

    @staticmethod
    def kept_latents(
        config: Config, process: Process, iteration: int, first: int, count: int
    ) -> np.ndarray:
        """The finished sample alone."""
        del config, iteration, first
        keep = np.zeros((count, len(process) + 1), dtype=bool)
        keep[:, -1] = True
        return keep

    def pair_loss(self, batch: UpdateBatch, kept: np.ndarray) -> PairLoss:
        """The loss of (sample, level) pairs of the samples `kept`."""
        raise NotImplementedError(f"{type(self).__name__} must define pair_loss")

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        count = max(1.0, sums["count"])
        named = {name: sums[name] / count for name in ("error", "loss")}
        if self.anchor_weight:
            named["anchor"] = sums["anchor"] / count
        if self.embedding_weight:
            named["embedding_anchor"] = sums["embedding_anchor"] * self.levels / count
        named["trained_pairs"] = int(sums["count"])
        return {f"forward/{name}": value for name, value in named.items()}

    def update_flops(self, metrics: Mapping[str, float], cost: PassFlops) -> float:
        extra = float(self.extra_passes + bool(self.anchor_weight))
        extra += self.first_passes / self.config.update.epochs
        return metrics["forward/trained_pairs"] * (cost.trained + extra * cost.forward)

    def shard_gradient(
        self, batch: UpdateBatch, kept: np.ndarray, valid: int
    ) -> tuple[list[Tensor], dict[str, float]]:
        return self._shard(batch, kept, valid, self.pair_loss(batch, kept))

    def _probed_gradient(self, batch: UpdateBatch, rows: np.ndarray) -> list[Tensor]:
        """That of the plain error: weights may be 0."""
        kept = np.concatenate(self._shards(rows))
        kept = kept[batch.mask[kept]][:PROBED]
        if not len(kept):
            return [torch.zeros_like(p) for p in self.parameters]
        valid = int(batch.mask[rows].sum())
        return self._shard(batch, kept, valid, Noised.error)[0]

    def _shard(
        self, batch: UpdateBatch, kept: np.ndarray, valid: int, pair_loss: PairLoss
    ) -> tuple[list[Tensor], dict[str, float]]:
        trajectory, pairs = batch.trajectory, self._pairs(batch, kept)
        levels, noise = self._levels(batch), self._noise(batch, kept)
        denoiser = self.likelihood.denoiser
        reference = self._reference(trajectory, np.unique(pairs.sample))
        # On the device: reading a number waits for all work queued before it.
        row = torch.zeros(4, dtype=torch.float64, device=self.backbone.device)
        count = valid * self.levels

        def loss(part: Pairs, prepared: Prepared, where: np.ndarray) -> Tensor:
            noised = self._noised(batch, part, levels, noise)
            output = denoiser.output(noised.step, noised.x, prepared, where)
            total = pair_loss(noised, output).sum()
            row[0] += noised.error(output.detach()).sum()
            row[1] += total.detach()
            if reference is not None and self.anchor_weight:
                with torch.no_grad(), self.adapter.disabled():
                    base = denoiser.output(noised.step, noised.x, reference[1], where)
                anchor = mean_square(output - base).sum()
                row[2] += anchor.detach()
                total = total + self.anchor_weight * anchor
            return total / count

        def embedding_loss(conditioning: Conditioning, prompt: np.ndarray) -> Tensor:
            assert reference is not None
            index = to_device(prompt, self.backbone.device)
            away = _embedding_distance(conditioning, reference[0])[index].sum()
            row[3] += away.detach()
            return self.embedding_weight * away / valid

        own: EmbeddingLoss | None = embedding_loss if self.embedding_weight else None
        gradient = gradient_of(
            self.likelihood,
            self.parameters,
            trajectory,
            pairs,
            loss,
            microbatch_size=self.microbatch_size,
            scale=loss_scale(count, self.backbone.latent_shape) * self.scale_factor,
            embedding_loss=own,
        )
        return gradient, dict(
            zip(ForwardLearner.sums, (float(len(pairs)), *row.tolist()), strict=True)
        )

    # ---- passes without gradient ------------------------------------------------------------

    @torch.no_grad()
    def outputs(self, batch: UpdateBatch, kept: np.ndarray) -> Iterator[tuple[Noised, Tensor]]:
        """The samples `kept` at their levels, and the outputs under the current weights there."""
        pairs, levels = self._pairs(batch, kept), self._levels(batch)
        noise = self._noise(batch, kept)
        rows, local = np.unique(pairs.sample, return_inverse=True)
        conditioning, prompt = self.likelihood.encode(batch.trajectory, rows)
        prepared = self.likelihood.denoiser.prepare(conditioning)
        for chunk in self.likelihood.chunks(pairs, self.microbatch_size):
            noised = self._noised(batch, pairs[chunk], levels, noise)
            where = prompt[local[chunk]]
            yield noised, self.likelihood.denoiser.output(noised.step, noised.x, prepared, where)

    @torch.no_grad()
    def _reference(
        self, trajectory: Trajectory, rows: np.ndarray
    ) -> tuple[Conditioning, Prepared] | None:
        """The prompts as the base policy encodes them, if there is an anchor to it."""
        if not self.anchor_weight and not self.embedding_weight:
            return None
        with self.adapter.disabled():
            conditioning = self.likelihood.encode(trajectory, rows)[0]
            return conditioning, self.backbone.prepare(conditioning)

    # ---- levels and noise: functions of the run's seed and the sample's number --------------

    def _levels(self, batch: UpdateBatch) -> np.ndarray:
        """The levels of each of the iteration's N samples, ascending: int64 [N, K]."""
        everything = list(range(len(self.process)))
        return randomness.trained_steps(
            self.config.seed, self.version, len(batch), everything, self.levels
        )

    def _pairs(self, batch: UpdateBatch, kept: np.ndarray) -> Pairs:
        return Pairs.of(kept, self._levels(batch), batch.first)

    def _noise(self, batch: UpdateBatch, kept: np.ndarray) -> dict[int, Tensor]:
        """Unit noise for each level of samples `kept`, by row of the trajectory: [K, C, h, w]."""
        seeds = randomness.noise_seeds(
            self.config.seed, self.version, len(batch), randomness.FORWARD
        )
        shape = (self.levels, *self.backbone.latent_shape)
        return {
            int(i - batch.first): randn_tensor(
                shape, torch.Generator("cpu").manual_seed(int(seeds[i])), torch.device("cpu")
            )
            for i in kept
        }

    def _noised(
        self, batch: UpdateBatch, part: Pairs, levels: np.ndarray, noise: Mapping[int, Tensor]
    ) -> Noised:
        device, process = self.backbone.device, self.process
        own = levels[part.sample + batch.first]
        place = (own == part.step[:, None]).argmax(axis=1)
        step = to_device(part.step, device)
        last = np.full(len(part), len(process))
        clean = to_device(batch.trajectory.latents_at(part.sample, last), device).float()
        drawn = [noise[sample][k] for sample, k in zip(part.sample, place, strict=True)]
        added = to_device(torch.stack(drawn), device)
        x, target = process.forward(step, clean, added), process.target(step, clean, added)
        return Noised(part, place, step, clean, x, target)


def _common(config: Config, trained: Collection[str]) -> ForwardObjective:
    """Settings that all of these share; those of a custom one are in `objective.kwargs`."""
    objective = config.objective
    if isinstance(objective, ForwardObjective):
        return objective
    assert isinstance(objective, CustomObjective)
    given = {k: v for k, v in objective.kwargs.items() if k in ForwardObjective.model_fields}
    try:
        common = ForwardObjective.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"objective.kwargs.{problem['loc'][0]}: {problem['msg']}") from None
    if common.embedding_anchor_weight and not set(trained) - set(DENOISERS):
        raise ConfigError(
            "objective.kwargs.embedding_anchor_weight: no text encoder is trained, so embeddings "
            "never change; set it to 0, or use anchor_weight"
        )
    return common


def _embedding_distance(one: Conditioning, other: Conditioning) -> Tensor:
    """Mean square difference of each prompt's embeddings, pooled ones included: float32 [P]."""
    pairs = [(one.hidden, other.hidden)]
    if one.pooled is not None and other.pooled is not None:
        pairs.append((one.pooled, other.pooled))
    return torch.stack([mean_square(a.float() - b.float()) for a, b in pairs]).sum(0)
