"""A sum along a fixed tree over numbered shards: the same bits on any number of learners.

Neighbours are added in pairs, then neighbouring pairs, and so on; an odd one out moves up
unchanged. A node is identified by its first shard and its level; it covers 2^level shards, or those
that are left. A learner that holds consecutive shards sums the largest nodes within them and sends
only these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Node(NamedTuple):
    """Shards `first` to `first + 2^level - 1`, as far as they exist."""

    first: int
    level: int


def tree_sum(rows: Tensor) -> Tensor:
    """The sum over all shards' rows, [S, P] to [P]."""
    while len(rows) > 1:
        paired = rows[: len(rows) // 2 * 2]
        rows = torch.cat([paired[0::2] + paired[1::2], rows[len(paired) :]])
    return rows[0]


def largest_nodes(first: int, end: int, shards: int) -> list[Node]:
    """The fewest nodes that make up shards `first` to `end - 1` of S, in order."""
    nodes = []
    while first < end:
        level = 0
        while first % 2 ** (level + 1) == 0 and _end(first, level, shards) < end:
            if _end(first, level + 1, shards) > end:
                break
            level += 1
        nodes.append(Node(first, level))
        first = _end(first, level, shards)
    return nodes


def complete(sums: Mapping[Node, Tensor], shards: int) -> Tensor:
    """The sum over all S shards, given the sums of nodes that make them up."""

    def total(node: Node) -> Tensor:
        if node in sums:
            return sums[node]
        left, middle = Node(node.first, node.level - 1), node.first + 2 ** (node.level - 1)
        if middle >= shards:
            return total(left)
        return total(left) + total(Node(middle, node.level - 1))

    return total(Node(0, (shards - 1).bit_length()))


def _end(first: int, level: int, shards: int) -> int:
    return min(first + 2**level, shards)
