"""What a LoRA file holds, from the header of its bytes alone. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable


def parts_apart(parts: Iterable[str], data: bytes | None) -> tuple[str, ...]:
    """Those of an adapter's parts that diffusers' loader does not reach.

    `data`: the exported safetensors file in diffusers' form; None if there is none.
    """
    names = () if data is None else json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tuple(p for p in parts if not any(name.startswith(f"{p}.") for name in names))
