"""The process of a configured model from its config files alone, without its weights."""

from __future__ import annotations

import importlib
from pathlib import Path

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from texforce_ray.artifacts.families import family_in, own_family
from texforce_ray.artifacts.inspection import read_json
from texforce_ray.artifacts.location import locate_model
from texforce_ray.config import Config
from texforce_ray.diffusion.ddim import Ddim
from texforce_ray.diffusion.flow import Flow
from texforce_ray.diffusion.process import Process
from texforce_ray.model.flow_models import set_levels


def planned_process(config: Config) -> Process | None:
    """The process that a run would use; None if the model is not here, or has one of its own.

    Raises:
        ConfigError: the model is not supported.
    """
    model, d = config.model, config.diffusion
    own = own_family(model.family)
    location = locate_model(
        model.path, model.variant, model.single_file_config, own, model.leave_out
    )
    folder = Path(model.single_file_config or location).expanduser()
    if own is not None or not (folder / "model_index.json").is_file():
        return None
    family = family_in(read_json(folder / "model_index.json", model.path), model.path)
    settings = read_json(folder / "scheduler" / "scheduler_config.json", model.path)
    if family.process == "ddim":
        scheduler = DDIMScheduler.from_config(settings, clip_sample=False, thresholding=False)
        return Ddim.of(scheduler, d.steps, d.eta)
    flow = FlowMatchEulerDiscreteScheduler.from_config(settings)
    module, _, name = family.backbone.partition(":")
    kind = getattr(importlib.import_module(module), name)
    network = read_json(folder / family.denoiser / "config.json", model.path)
    blocks = read_json(folder / "vae" / "config.json", model.path)["block_out_channels"]
    scale = 2 ** (len(blocks) - 1)
    side = kind.default_side(network, scale)
    sides = (d.height // scale, d.width // scale) if d.height and d.width else (side, side)
    set_levels(flow, d.steps, sides, kind.max_shift, kind.levels(d.steps))
    return Flow.of(flow.timesteps, flow.sigmas, d.kernel, d.eta)
