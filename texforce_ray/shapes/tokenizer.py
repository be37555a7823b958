"""A real CLIP tokenizer with a byte-level vocabulary of its own: any text can be encoded."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 24
_BOS, _EOS, _END = "<|startoftext|>", "<|endoftext|>", "</w>"


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each of the 256 byte values, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that turn each of `words` into a single token: most frequent pair first."""
    spellings = [[*word[:-1], word[-1] + _END] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while True:
        pairs: dict[tuple[str, str], int] = {}
        for spelling in spellings:
            for pair in pairwise(spelling):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            return merges
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append(best)
        spellings = [_apply(spelling, best) for spelling in spellings]


def _apply(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in spelling:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def build_tokenizer(words: list[str]) -> CLIPTokenizer:
    """A tokenizer in which each of `words` is one token and every other text is bytes."""
    from transformers import CLIPTokenizer

    alphabet = _byte_alphabet()
    merges = _merges(words)
    tokens = [*alphabet, *(c + _END for c in alphabet), *(a + b for a, b in merges), _BOS, _EOS]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_LENGTH,
        pad_token=_EOS,
    )
