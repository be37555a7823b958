"""Packs actors onto nodes: how many rollout actors fit beside the others. Pure; no Ray.

Exact on small clusters: the search first tries the node that costs the fewest rollout actors, which
mostly finds the answer at once. If it takes too long, the best answer so far counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

_UNITS = 10_000  # Ray counts resources in ten-thousandths
_STEPS = 3_000  # limit of the search: a second on a large cluster

Amounts = Mapping[str, float]


class _Pieces(NamedTuple):
    """What a node has, or an actor needs. Each GPU is separate: two halves are not a whole one."""

    amounts: tuple[int, ...]
    gpus: tuple[int, ...]  # ascending


def most(
    others: Sequence[tuple[Amounts, int]], filler: Amounts, wanted: int, nodes: Sequence[Amounts]
) -> int:
    """How many actors like `filler` fit beside all the others, at most `wanted`.

    Args:
        others: resources of an actor, and how many of those there are.
        filler: resources of the actor that is counted.
        wanted: upper limit of the count.
        nodes: free resources of each node.

    Returns:
        The number, or -1 if the others do not fit.
    """
    asked = [each for each, count in others if count]
    names = sorted({name for each in [*asked, filler] for name in each} - {"GPU"})
    fixed = [_pieces(each, names) for each, count in others for _ in range(count)]
    fixed = [need for need in fixed if need.gpus or any(need.amounts)]  # the rest fits anywhere
    fixed.sort(key=lambda need: (sum(need.gpus), sum(need.amounts)), reverse=True)
    return _search(fixed, _pieces(filler, names), wanted, [_pieces(node, names) for node in nodes])


def short_of(needed: Amounts, free: Amounts) -> list[str]:
    """Names of resources of which there is not enough in total."""
    return [name for name, amount in needed.items() if free.get(name, 0) + 1e-6 < amount]


def _search(
    fixed: Sequence[_Pieces], filler: _Pieces, wanted: int, nodes: Sequence[_Pieces]
) -> int:
    """Depth first, the most promising node first."""
    best, steps = -1, _STEPS
    seen: set[tuple[int, tuple[_Pieces, ...]]] = set()

    @cache
    def capacity(node: _Pieces) -> int:
        if not filler.gpus:
            pairs = zip(node.amounts, filler.amounts, strict=True)
            return min([wanted, *(has // asked for has, asked in pairs if asked)])
        count, left = 0, _without(node, filler)
        while left is not None and count < wanted:
            count, left = count + 1, _without(left, filler)
        return count

    open_states = [(0, tuple(sorted(nodes)))] if nodes and _enough(fixed, nodes) else []
    while open_states and steps and best < wanted:
        index, free = open_states.pop()
        bound = min(wanted, sum(map(capacity, free)))  # what is placed later only lowers it
        if bound <= best or (index, free) in seen:
            continue
        if index == len(fixed):
            best = bound
            continue
        seen.add((index, free))
        steps -= 1
        choices = []
        for node in dict.fromkeys(free):
            left = _without(node, fixed[index])
            if left is not None:
                lost = capacity(node) - capacity(left)
                choices.append((lost, sum(left.gpus), sum(left.amounts), node, left))
        for *_, node, left in sorted(choices, reverse=True):
            rest = list(free)
            rest.remove(node)
            open_states.append((index + 1, tuple(sorted([*rest, left]))))
    return best


def _enough(needs: Sequence[_Pieces], nodes: Sequence[_Pieces]) -> bool:
    """Whether there is enough in total; if not, a search is pointless."""

    def summed(pieces: Sequence[_Pieces]) -> list[int]:
        return [sum(column) for column in zip(*(piece.amounts for piece in pieces), strict=True)]

    if not needs:
        return True
    gpus = sum(sum(node.gpus) for node in nodes) >= sum(sum(need.gpus) for need in needs)
    enough = zip(summed(nodes), summed(needs), strict=True)
    return gpus and all(has >= asked for has, asked in enough)


def _pieces(resources: Amounts, names: Sequence[str]) -> _Pieces:
    whole, part = divmod(round(resources.get("GPU", 0) * _UNITS), _UNITS)
    gpus = (*((part,) if part else ()), *([_UNITS] * whole))
    return _Pieces(tuple(round(resources.get(name, 0) * _UNITS) for name in names), gpus)


def _without(node: _Pieces, need: _Pieces) -> _Pieces | None:
    """What is left of a node, or None if it is too small; a share of a GPU comes from one GPU."""
    amounts = tuple(has - asked for has, asked in zip(node.amounts, need.amounts, strict=True))
    if any(left < 0 for left in amounts):
        return None
    gpus = list(node.gpus)
    for asked in need.gpus:
        piece = next((has for has in gpus if has >= asked), None)  # the smallest that will do
        if piece is None:
            return None
        gpus.remove(piece)
        if piece > asked:
            gpus = sorted([*gpus, piece - asked])
    return _Pieces(amounts, tuple(gpus))
