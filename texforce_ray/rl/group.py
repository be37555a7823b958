"""Several learners as one: they gather what each computed on its fixed shards. No Ray.

Gathered in the order of the shards and summed by everyone alike, rather than all-reduced: 1, 2 and
4 learners give the same bits, and the gradient of an adapter is only a few MB.
"""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from torch import Tensor

from texforce_ray.errors import PeerLostError


class Alone:
    """One learner computes all shards."""

    rank, size = 0, 1

    def gather(self, own: Tensor) -> Tensor:
        """Own shards' rows [S / size, P] to all shards' rows [S, P], in order."""
        return own

    def close(self) -> None:
        """Leave the group."""


class Together(Alone):
    """`size` learners that meet at `address` ('tcp://host:port'); gloo on CPU, nccl on GPU.

    Raises:
        PeerLostError: not all came, or one was lost since.
    """

    def __init__(
        self, address: str, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        self.rank, self.size = rank, size
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=address,
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=timeout_s),
            )
        except RuntimeError as error:  # torch's DistError is one
            raise PeerLostError(
                f"learner {rank} of {size} waited for the others: {error}"
            ) from None

    def gather(self, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        try:
            dist.all_gather(parts, own.contiguous())
        except RuntimeError as error:
            raise PeerLostError(f"learner {self.rank} lost another one: {error}") from None
        return torch.cat(parts)

    def close(self) -> None:
        """Leave the group; the others may be dead."""
        # NCCL's orderly end may wait for them for ever. Private, so it may be gone one day.
        abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
        if abort is not None and dist.get_backend() == "nccl":
            abort()
        else:
            dist.destroy_process_group()
