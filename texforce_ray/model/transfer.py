"""Copies between host and device that do not wait for the device's queued work.

An ordinary copy to a GPU waits until the GPU has done all that was queued before, and leaves it
idle until the next work arrives. A copy from page-locked memory is queued like any other work.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """A copy on the device, in order with its queued work; on the CPU, the values themselves."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, which is valid only after `arrived`."""
    return tensor.to("cpu", non_blocking=True)


def arrived(device: torch.device) -> None:
    """Wait for everything queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
