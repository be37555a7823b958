"""Text encoders that are not trained: their outputs are kept, and they can wait in host memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from texforce_ray.model.transfer import to_device

# Of token ids [B, L]: each output has one row for each prompt.
Encode = Callable[[Any, Tensor], Sequence[Tensor]]


class TextEncoder:
    """One text encoder of a backbone.

    While it has no adapter, each prompt is encoded once and alone, so that its embedding does not
    depend on the prompts beside it, and the last `capacity` ones are kept in host memory.
    """

    def __init__(
        self, module: Any, encode: Encode, device: torch.device, *, parked: bool, capacity: int
    ) -> None:
        """`parked`: in host memory while it is not trained, except to encode new prompts."""
        self.module, self.encode, self.device = module, encode, device
        self.parked, self.capacity = parked, capacity
        self._kept: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()

    @property
    def trained(self) -> bool:
        """Whether it has an adapter, switched on or not."""
        return hasattr(self.module, "peft_config")

    def __call__(self, ids: Tensor) -> Sequence[Tensor]:
        """The outputs for ids [B, L], with gradient if it is trained."""
        if self.trained:
            self.module.to(self.device)
            return self.encode(self.module, to_device(ids, self.device))
        if not self.capacity:
            self.module.to(self.device)
            outputs = self._run(ids)
            self._park()
            return outputs
        keys = [row.numpy().tobytes() for row in ids]
        if missing := {
            key: row for key, row in zip(keys, ids, strict=True) if key not in self._kept
        }:
            self._fill(missing)
        for key in keys:
            self._kept.move_to_end(key)
        columns = zip(*(self._kept[key] for key in keys), strict=True)
        joined = [to_device(torch.cat(column), self.device) for column in columns]
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return joined

    def _fill(self, missing: dict[bytes, Tensor]) -> None:
        self.module.to(self.device)
        for key, row in missing.items():
            self._kept[key] = tuple(output.cpu() for output in self._run(row[None]))
        self._park()

    def _park(self) -> None:
        if self.parked:
            self.module.to("cpu")

    @torch.no_grad()
    def _run(self, ids: Tensor) -> Sequence[Tensor]:
        return self.encode(self.module, ids.to(self.device))
