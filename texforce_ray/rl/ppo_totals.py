"""Sums over everything PPO trained on in an iteration, and the metrics computed from them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from texforce_ray.rl.ppo import PpoLoss

_METRICS = ("ppo/loss", "ppo/approx_kl", "ppo/clipfrac", "ppo/ratio", "ppo/kl_base")


class Totals:
    """Sums over the pairs of one shard that an iteration trained on.

    Kept on the device, because reading a number waits for all work queued before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self._sums = torch.zeros(len(_METRICS), dtype=torch.float64, device=device)
        self._kl = torch.zeros((), dtype=torch.float64, device=device)  # since the last `take_kl`
        self._error = torch.zeros((), device=device)
        self._taken = 0  # the count at that time

    @torch.no_grad()
    def add(self, result: PpoLoss, kl_base: Tensor | None, ratio_error: Tensor) -> None:
        """`ratio_error`: r - 1 of each pair, before any levelling."""
        self.count += len(result.ratio)
        self._error = torch.maximum(self._error, ratio_error.abs().max())
        # NaN if not computed, and then left out of the metrics.
        kl = torch.full_like(result.ratio, float("nan")) if kl_base is None else kl_base
        columns = (result.loss, result.approx_kl, result.clipped, result.ratio, kl)
        self._sums += torch.stack([column.sum() for column in columns]).double()
        self._kl += result.approx_kl.sum()

    def take_kl(self) -> list[float]:
        """Count and sum of approx_kl since the last call."""
        taken = [float(self.count - self._taken), float(self._kl)]
        self._taken = self.count
        self._kl.zero_()  # not a difference of sums: one NaN would spoil all later ones
        return taken

    @property
    def ratio_error(self) -> float:
        """Largest |r - 1| so far."""
        return float(self._error)

    def row(self) -> list[float]:
        return [float(self.count), *self._sums.tolist()]


def mean_metrics(rows: np.ndarray) -> dict:
    """Means over all pairs of all shards, given their counts and sums: float64 [S, 1 + M]."""
    count, *sums = rows.sum(axis=0)
    means = {name: float(s / max(1.0, count)) for name, s in zip(_METRICS, sums, strict=True)}
    computed = {name: value for name, value in means.items() if not np.isnan(value)}
    return computed | {"ppo/trained_pairs": int(count)}
