"""torch.compile by region: each kind of block is compiled once, whatever the network's depth."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from texforce_ray.errors import ConfigError

# Kinds of block by width, with and without gradient and adapter, a few batch sizes. Beyond the
# limit (8), torch would silently run the rest uncompiled.
_MOST_GRAPHS = 256


def compile_regions(network: nn.Module, kinds: Sequence[str], **options: Any) -> None:
    """Compile the outermost modules of these classes, or the whole network if none are named.

    Blocks of a class share their compiled code if their shapes are equal. Shapes must not vary with
    anything but the batch size. Hooks of the regions stay outside of what is compiled.
    """
    if "backend" not in options:
        _check_compiler(next(network.parameters()).device)
    config = torch._dynamo.config
    # Later versions than 2.6 call these recompile_limit and accumulated_recompile_limit.
    config.cache_size_limit = max(_MOST_GRAPHS, config.cache_size_limit)
    config.accumulated_cache_size_limit = max(4 * _MOST_GRAPHS, config.accumulated_cache_size_limit)
    _share_processors(network)
    regions = list(outermost(network, kinds)) if kinds else [network]
    if not regions:
        raise ConfigError(
            f"model.compile: true, but {type(network).__name__} has no {' or '.join(kinds)}, which "
            "its backbone's `blocks` name; correct them, or set model.compile to false"
        )
    for region in regions:
        region.forward = torch.compile(region.forward, dynamic=False, **options)


def _check_compiler(device: torch.device) -> None:
    """Refuse what would otherwise fail in the first batch.

    Raises:
        ConfigError: there is no compiler on this machine.
    """
    # Triton builds its launchers in C, inductor its loops on a CPU in C++.
    variable, usual = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang"])
    names = shlex.split(os.environ.get(variable, ""))[:1] or usual
    if not any(shutil.which(name) for name in names):
        raise ConfigError(
            f"model.compile: true, but {platform.node()} has no {' or '.join(names)}; "
            f"install a compiler, name one in {variable}, or set model.compile to false"
        )


def _share_processors(network: nn.Module) -> None:
    """Let attention layers have one processor of each kind: by torch 2.6, it must be one object."""
    shared: dict[Any, Any] = {}
    for module in network.modules():
        processor = getattr(module, "processor", None)
        if processor is not None and not isinstance(processor, nn.Module):
            state = repr(sorted(vars(processor).items()))
            module.processor = shared.setdefault((type(processor), state), processor)


def outermost(network: nn.Module, kinds: Sequence[str]) -> Iterator[nn.Module]:
    """Modules of these classes, by name, that are in no other of them."""
    for child in network.children():
        if type(child).__name__ in kinds:
            yield child
        else:
            yield from outermost(child, kinds)
