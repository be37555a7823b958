"""What the small runs of stand-ins have in common that tests start as processes of their own."""

from __future__ import annotations

from typing import Any

EACH = {"num_cpus": 0, "num_threads": 1}  # an actor that needs no room
SMALL: dict[str, Any] = {
    "diffusion": {"steps": 4},
    "prompts": {"per_iteration": 4, "samples_per_prompt": 4},
    "advantage": {"mode": "batch"},
    "objective": {"max_ratio_error": 1.0},
}
