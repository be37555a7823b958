"""Damages bytes the way disks, editors and strangers do, and a little beyond."""

from __future__ import annotations

import random

TOKENS = (
    b"NaN", b"Infinity", b"1e999", b"-1", b"0", b"9" * 30, b"null", b"true", b"{}", b"[]", b'""',
    b"${", b"${oc.env:HOME}", b"!!python/object/apply:os.system ['true']", b"&a [*a]", b"\x00",
    b"\xff\xfe", b"\xe2\x80\xa8", b"\r", b"\n\n", b"[" * 3000, b'{"a":' * 3000, b"a" * 20_000,
    b": ", b"- ", b"  ", b"#", b"'", b'"', b"\\", b"\\u0000", b"\xf0\x9f\x8e\xa8", b"../../x",
)  # fmt: skip


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """`data` after one to four changes; `others` are well-formed files to take pieces from."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = _once(data, others, rng)
    return data


def _once(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 1, 4, 16, 256, 65_536)))
    match rng.randrange(8):
        case 0:
            return data[:start]
        case 1:
            flipped = bytearray(data)
            for place in range(start, min(end, start + 4)):
                flipped[place] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 2:
            return data[:start] + rng.randbytes(rng.choice((1, 8, 64))) + data[end:]
        case 3:
            return data[:start] + data[end:]
        case 4:
            return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]
        case 5:
            return data[:start] + rng.choice(TOKENS) + data[start:]
        case 6:
            return data[:start] + rng.choice(TOKENS) + data[end:]
        case _:
            other = rng.choice(others)
            cut = rng.randrange(len(other) + 1)
            return data[:start] + other[cut : cut + 4096] + data[end:]
