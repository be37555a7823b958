"""Several learners acting as one: sums what each computed on its fixed shards. No Ray.

Sums follow a fixed tree over the shards, so that 1, 2, 4, ... learners give the same bits; the
order of additions in an all-reduce depends on the number of learners.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from texforce_ray.errors import PeerLostError
from texforce_ray.rl.tree_sum import Node, complete, largest_nodes, tree_sum


class SoloGroup:
    """One learner computes all shards."""

    rank, size = 0, 1

    received_bytes = 0  # from other learners, so far

    def gather(self, own: Tensor) -> Tensor:
        """All shards' rows [S, P], in order, from own shards' rows [S / size, P]."""
        return own

    def sum(self, own: Tensor) -> Tensor:
        """The sum over all shards, [P], from own shards' rows [S / size, P]."""
        return tree_sum(own)

    def close(self) -> None:
        """Leave the group."""


class LearnerGroup(SoloGroup):
    """`size` learners that meet at `address` ('tcp://host:port'); gloo on CPU, nccl on GPU.

    Raises:
        PeerLostError: a learner did not join, or was lost later.
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
                f"learner {rank} of {size} could not reach the others: {error}"
            ) from None

    def gather(self, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self._peers():
            dist.all_gather(parts, own.contiguous())
        self.received_bytes += (self.size - 1) * own.nbytes
        return torch.cat(parts)

    def sum(self, own: Tensor) -> Tensor:
        if _power_of_two(len(own)) and _power_of_two(self.size):
            return self._doubled(tree_sum(own))
        shards = len(own) * self.size
        nodes = [
            largest_nodes(rank * len(own), (rank + 1) * len(own), shards)
            for rank in range(self.size)
        ]
        sums = [self._node(own, node, shards) for node in nodes[self.rank]]
        most = max(map(len, nodes))
        sums += [torch.zeros_like(own[0])] * (most - len(sums))  # every learner sends as many
        rows = self.gather(torch.stack(sums)).unflatten(0, (self.size, most))
        pairs = zip(nodes, rows, strict=True)
        totals = {node: row for ns, each in pairs for node, row in zip(ns, each, strict=False)}
        return complete(totals, shards)

    def _node(self, own: Tensor, node: Node, shards: int) -> Tensor:
        first = node.first - self.rank * len(own)
        return tree_sum(own[first : first + min(2**node.level, shards - node.first)])

    def _doubled(self, total: Tensor) -> Tensor:
        """Recursive doubling: in each round, learners of neighbouring subtrees swap their sums."""
        distance = 1
        while distance < self.size:
            partner, other = self.rank ^ distance, torch.empty_like(total)
            with self._peers():
                swap = [dist.P2POp(dist.isend, total.contiguous(), partner)]
                swap.append(dist.P2POp(dist.irecv, other, partner))
                for request in dist.batch_isend_irecv(swap):
                    request.wait()
            self.received_bytes += other.nbytes
            total = total + other  # addition commutes: the same bits on both
            distance *= 2
        return total

    @contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise PeerLostError(f"learner {self.rank} lost a peer: {error}") from None

    def close(self) -> None:
        """Leave the group; the others may be dead."""
        # NCCL's orderly shutdown may wait for them forever. Private, so it may disappear one day.
        abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
        if abort is not None and dist.get_backend() == "nccl":
            abort()
        else:
            dist.destroy_process_group()


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0
