"""Everything that a run reads, checked before anything is started."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from texforce_ray.artifacts.families import Family, family_in, own_family, wrong_process
from texforce_ray.artifacts.inspection import read_json
from texforce_ray.artifacts.location import find_adapter, locate_model
from texforce_ray.cluster.connection import check_startable
from texforce_ray.cluster.environments import reward_environment
from texforce_ray.config import Config
from texforce_ray.errors import ConfigError
from texforce_ray.prompts import Prompt, load_prompts
from texforce_ray.records.tracking import check_trackers
from texforce_ray.rewards import check_differentiable, resolve


@dataclass(frozen=True)
class PromptSets:
    """Prompts for training, for evaluation, and for an additional comparison at the end."""

    train: list[Prompt]
    evaluation: list[Prompt]
    unseen: list[Prompt]

    def all(self) -> list[Prompt]:
        return [*self.train, *self.evaluation, *self.unseen]


def check_inputs(config: Config, *, new: bool = True) -> PromptSets:
    """Check all inputs before anything is started; returns the prompts.

    `new`: False for a resumed run, which no longer needs the adapter that it began with.
    """
    check_startable(config)
    model = config.model
    family = own_family(model.family)
    location = locate_model(
        model.path, model.variant, model.single_file_config, family, model.leave_out
    )
    _check_process(config, Path(location), family)
    _check_module(getattr(config.objective, "target", None), "objective.target")
    if new and config.lora.init is not None:
        find_adapter(Path(config.lora.init).expanduser(), f"lora.init: {config.lora.init}")
    check_trackers(config.track)
    for reward in config.rewards:
        resolve(reward.name, reward.target)
        reward_environment(reward)
        if config.direct is not None and reward.weight:
            check_differentiable(reward.name)
    train = load_prompts(config.prompts.train)
    return PromptSets(
        train=train,
        evaluation=load_prompts(config.eval.prompts) if config.eval.prompts else train,
        unseen=load_prompts(config.eval.unseen) if config.eval.unseen else [],
    )


def _check_process(config: Config, location: Path, own: Family | None) -> None:
    """Check that the model is one that `diffusion.process` denoises, if it is here already."""
    folder = Path(config.model.single_file_config or location).expanduser()
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json", config.model.path)
        family = family_in(index, config.model.path, own, config.model.leave_out)
        if family.process not in (None, config.diffusion.process):
            raise wrong_process(family, config.model.path, config.diffusion.process)


def _check_module(target: str | None, key: str) -> None:
    """Check that the module of 'module:Class' exists; the actor that uses it imports it."""
    module = (target or "").partition(":")[0]
    if not module:
        return
    try:
        exists = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package
        exists = False
    except Exception as error:  # parent packages are imported: anything may go wrong
        raise ConfigError(f"{key}: {target!r} cannot be imported: {error!r}") from error
    if not exists:
        raise ConfigError(
            f"{key}: {target!r} cannot be imported: there is no module {module!r} on the path "
            f"({os.getcwd()}, PYTHONPATH, installed packages)"
        )
