"""One sum, whoever computes its parts: the same bits for any number of learners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from texforce_ray.rl import group
from texforce_ray.rl.tree_sum import complete, largest_nodes, tree_sum


def _rows(shards: int) -> Tensor:
    """Rows whose sum depends on the order of its additions."""
    generator = torch.Generator().manual_seed(shards)
    return torch.randn(shards, 50, generator=generator) * 10 ** torch.arange(50).remainder(9)


@given(shards=st.integers(1, 24), learners=st.integers(1, 24))
def test_parts_of_any_learners_make_the_same_sum(shards: int, learners: int) -> None:
    shards *= learners
    rows, share = _rows(shards), shards // learners
    sums = {}
    for rank in range(learners):
        for node in largest_nodes(rank * share, (rank + 1) * share, shards):
            sums[node] = tree_sum(rows[node.first : min(node.first + 2**node.level, shards)])
    assert torch.equal(complete(sums, shards), tree_sum(rows))
    torch.testing.assert_close(tree_sum(rows.double()), rows.double().sum(0))


def test_shards_of_a_power_of_two_are_one_node() -> None:
    assert [len(largest_nodes(first, first + 8, 32)) for first in range(0, 32, 8)] == [1] * 4
    assert [len(largest_nodes(first, first + 6, 12)) for first in (0, 6)] == [2, 2]


@pytest.mark.parametrize(
    ("shards", "size", "received"),
    [(8, 2, 1), (8, 4, 2), (8, 8, 3), (16, 8, 3), (12, 3, 2), (12, 2, 2), (6, 2, 2)],
)
def test_learners_receive_few_rows_and_agree(
    shards: int, size: int, received: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, share = _rows(shards), shards // size
    parts = rows.split(share)
    members = [object.__new__(group.LearnerGroup) for _ in range(size)]
    for rank, member in enumerate(members):
        member.rank, member.size = rank, size
    # In lockstep: what each one sends in a round is known before any of them receives.
    sent: dict[int, Tensor] = {}

    def all_gather(into: list[Tensor], own: Tensor) -> None:
        for rank, member in enumerate(members):
            into[rank].copy_(_padded(member, parts[rank], len(own)))

    def exchange(operations: list[Any]) -> list[Any]:
        operations[1].tensor.copy_(sent[operations[1].peer])
        return []

    monkeypatch.setattr(group.dist, "all_gather", all_gather)
    monkeypatch.setattr(group.dist, "P2POp", lambda op, tensor, peer: _Op(tensor, peer))
    monkeypatch.setattr(group.dist, "batch_isend_irecv", exchange)
    expected = tree_sum(rows)
    for rank, member in enumerate(members):
        # Recursive doubling, as seen by one: its partner of round k has the sum of its subtree.
        for bit in range(size.bit_length()):
            partner = rank ^ (1 << bit)
            first = partner >> bit << bit
            if first < size:
                sent[partner] = tree_sum(rows[first * share : (first + (1 << bit)) * share])
        assert torch.equal(member.sum(parts[rank]), expected)
        assert member.received_bytes == received * rows[0].nbytes
        member.received_bytes = 0


class _Op:
    def __init__(self, tensor: Tensor, peer: int) -> None:
        self.tensor, self.peer = tensor, peer


def _padded(member: group.LearnerGroup, part: Tensor, count: int) -> Tensor:
    """What this learner gathers: its nodes' sums, and zeros."""
    shards, first = len(part) * member.size, member.rank * len(part)
    sums = [member._node(part, n, shards) for n in largest_nodes(first, first + len(part), shards)]
    return torch.stack(sums + [torch.zeros_like(part[0])] * (count - len(sums)))
