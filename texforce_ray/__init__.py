"""TexForce on Ray: reinforcement learning of Stable Diffusion's text encoder.

Importing this package loads neither torch nor Ray: reward environments and `--help` need neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from texforce_ray.driver.training import train

__version__ = "0.1.0"
__all__ = ["__version__", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from texforce_ray.driver.training import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
