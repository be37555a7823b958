"""DiffusionNFT: learn from good and bad samples at once, without a likelihood (Zheng et al. 2025).

Written in terms of the clean latent that an output stands for, x0(output), instead of a velocity:
the mixtures of two policies' outputs are the same mixtures of these, since x0 is affine in the
output. So it holds for epsilon-, v- and sample-prediction alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from texforce_ray.artifacts.snapshot import Learned, PolicySnapshot, Tensors
from texforce_ray.config import Config, NftObjective
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.transfer import arrived, to_device, to_host
from texforce_ray.rl.forward import nft_loss, nft_probability, old_decay
from texforce_ray.rl.forward_learner import ForwardLearner, Noised, PairLoss
from texforce_ray.rl.sharding import UpdateBatch


class NftLearner(ForwardLearner):
    """Two policies: `old` samples, and is what the adapter holds between updates; `trained` learns.

    After each iteration `old` follows `trained` by d old + (1 - d) trained. What is evaluated and
    exported is `trained`, or its moving average.
    """

    extra_passes = 1

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__(backbone, config)
        assert isinstance(config.objective, NftObjective)
        self.nft: NftObjective = config.objective
        self.trained = self._copy()
        self._old: Sequence[Tensor] = []  # during an update

    # ---- state ---------------------------------------------------------------------------

    def copies_from_adapter(self) -> None:
        super().copies_from_adapter()
        self.trained = self._copy()

    def own_state(self) -> Tensors:
        return {f"trained/{i}": t.cpu().numpy().copy() for i, t in enumerate(self.trained)}

    def load_own_state(self, own: Tensors) -> None:
        self.trained = [
            torch.from_numpy(np.array(own[f"trained/{i}"])).to(p.device)
            for i, p in enumerate(self.parameters)
        ]

    def learned(self) -> Learned:
        learned = super().learned()
        if learned.average is not None:
            return learned
        with self._weights(self.trained):
            return learned._replace(average=self.adapter.snapshot(self.version))

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    # ---- update --------------------------------------------------------------------------

    def update(
        self, batch: UpdateBatch, behaviour: PolicySnapshot | None = None
    ) -> dict[str, float]:
        self._old = self._copy()
        self._set(self.trained)
        try:
            metrics = super().update(batch, behaviour)
            self.trained = self._copy()
        finally:
            self._set(self._old)
        decay = old_decay(self.version, self.nft)
        followed = [t + decay * (old - t) for old, t in zip(self._old, self.trained, strict=True)]
        self._set(followed)
        self._old = []
        return metrics | {"forward/old_decay": decay}

    def pair_loss(self, batch: UpdateBatch, kept: np.ndarray) -> PairLoss:
        old, device, process = self._old_outputs(batch, kept), self.backbone.device, self.process
        good = nft_probability(batch.advantages, self.nft.advantage_max)

        def loss(noised: Noised, output: Tensor) -> Tensor:
            step, x, sample = noised.step, noised.x, noised.pairs.sample
            places = zip(sample.tolist(), noised.place.tolist(), strict=True)
            before = to_device(torch.stack([old[place] for place in places]), device)
            probability = to_device(torch.from_numpy(good[sample + batch.first]).float(), device)
            return nft_loss(
                process.x0(step, x, output),
                process.x0(step, x, before),
                noised.clean,
                probability,
                self.nft,
            )

        return loss

    def _old_outputs(self, batch: UpdateBatch, kept: np.ndarray) -> dict[tuple[int, int], Tensor]:
        """The old policy's outputs, by (row, place of the level).

        All of a shard's before the first gradient: changing weights between a forward and its
        backward pass would spoil the gradient.
        """
        found: dict[tuple[int, int], Tensor] = {}
        with self._weights(self._old):
            for noised, output in self.outputs(batch, kept):
                pairs = zip(noised.pairs.sample.tolist(), noised.place.tolist(), strict=True)
                found |= dict(zip(pairs, to_host(output), strict=True))
        arrived(self.backbone.device)
        return found
