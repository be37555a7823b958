"""The facts that a model card shows of a run's adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from texforce_ray.artifacts.location import absent_encoders
from texforce_ray.artifacts.snapshot import LoraShape
from texforce_ray.config import Config, CustomObjective, DirectObjective, PpoObjective


@dataclass(frozen=True)
class BaseModel:
    """The pipeline that an adapter belongs to, as named by `model` in the run's config."""

    path: str
    revision: str | None = None
    variant: str | None = None
    denoiser: str | None = None
    denoiser_adapters: tuple[str, ...] = ()
    single_file_config: str | None = None
    absent: tuple[str, ...] = ()  # text encoders that the pipeline can do without, and does


@dataclass(frozen=True)
class ModelCardInfo:
    """The facts that a model card shows.

    Attributes:
        base: the pipeline that the adapter belongs to.
        shapes: rank, alpha and layers of each adapted component, by the pipeline's names.
        rewards: name and weight of each reward.
        iterations: iterations trained.
        samples: images sampled in total.
        settings: further settings to list.
        drawing: arguments that make a pipeline draw as in training, e.g. `clip_skip`.
        scores: per reward "base", "tuned", "difference", "low", "high", "images"; may be empty.
        files: names of the exported files, including the component's folder if there is one.
        method: how it was trained: "PPO", or a method of direct backpropagation.
        evaluated_on: which prompts and seeds gave the scores.
        apart: parts that diffusers' LoRA loader does not reach: PEFT loads them.
        flow: whether the base is a flow-matching model.
    """

    base: BaseModel
    shapes: Mapping[str, LoraShape]
    rewards: tuple[tuple[str, float], ...]
    iterations: int
    samples: int
    settings: Mapping[str, object]
    scores: Mapping[str, Mapping[str, Any]]
    files: tuple[str, ...]
    drawing: Mapping[str, object] = field(default_factory=dict)
    method: str = "PPO"
    evaluated_on: str = "held-out prompts"
    apart: tuple[str, ...] = ()
    flow: bool = False


_METHODS = {"refl": "ReFL", "draft": "DRaFT", "alignprop": "AlignProp"}


def _method(config: Config) -> str:
    if config.direct is not None:
        return _METHODS[config.direct.method]
    own = getattr(config.objective, "target", "")
    return own.rpartition(":")[2] or config.objective.kind.upper()


def _objective(config: Config) -> dict[str, object]:
    """The objective's own settings, by the words of their keys."""
    if isinstance(config.objective, CustomObjective | DirectObjective):
        return {}
    values = config.objective.model_dump(exclude={"kind"})
    if isinstance(config.objective, PpoObjective):  # those that differ from plain PPO's
        plain = PpoObjective().model_dump(exclude={"clip_range"})
        values = {key: value for key, value in values.items() if plain.get(key) != value}
        values.pop("clip_range" if config.objective.trust == "kl_mask" else "trust_kl", None)
    named = {key.replace("_", " "): value for key, value in values.items() if value is not None}
    return named | {"advantage": config.advantage.mode}


def card_info(
    config: Config,
    shapes: Mapping[str, LoraShape],
    scores: Mapping[str, Mapping[str, Any]],
    files: tuple[str, ...],
    apart: tuple[str, ...] = (),
) -> ModelCardInfo:
    """The model card's facts for a run's adapter.

    `files`: names of the exported files; `apart`: parts that diffusers' loader does not reach.
    """
    m, lora = config.model, config.lora
    settings: dict[str, object] = {
        "denoising steps": config.diffusion.steps,
        "denoising steps for the scores below": config.evaluation_steps,
        "guidance scale": config.diffusion.guidance_scale,
        "guidance scale for the scores below": config.evaluation_guidance,
        "eta": config.diffusion.eta,
        "eta for the scores below": config.evaluation_eta,
        "learning rate": config.optimizer.lr,
    }
    settings |= _process(config)
    parts = {
        "text encoder": lora.text_encoder,
        "third text encoder": lora.text_encoder_3,
        "denoiser": lora.denoiser,
    }
    if lora.text_encoder_2 != "same":
        parts["second text encoder"] = lora.text_encoder_2
    for name, adapter in parts.items():
        if adapter is not None and adapter.lr is not None:
            settings[f"learning rate of the {name}"] = adapter.lr
    if lora.init is not None:
        settings["started from the adapter"] = lora.init
    settings |= _objective(config)
    return ModelCardInfo(
        base=BaseModel(
            m.path,
            m.revision,
            m.variant,
            m.denoiser,
            m.denoiser_adapters,
            m.single_file_config,
            absent_encoders(m.path, m.leave_out),
        ),
        shapes=shapes,
        rewards=tuple((reward.key, reward.weight) for reward in config.rewards),
        iterations=config.iterations,
        samples=config.iterations * config.samples_per_iteration,
        settings={**settings, "seed": config.seed},
        scores=scores,
        files=files,
        drawing={
            name: value
            for name in (
                "height",
                "width",
                "clip_skip",
                "negative_prompt",
                "max_sequence_length",
            )
            if (value := getattr(config.diffusion, name)) is not None
        },
        apart=apart,
        flow=config.diffusion.process == "flow",
        method=_method(config),
        evaluated_on="separate evaluation prompts, with seeds never trained on"
        if config.eval.prompts
        else "the training prompts, with seeds never trained on",
    )


def _process(config: Config) -> dict[str, object]:
    """How a flow's samples got their noise."""
    d = config.diffusion
    found: dict[str, object] = {"kernel": d.kernel} if d.process == "flow" and d.eta else {}
    if d.window is not None:
        first, end = d.window_range
        found["steps with noise"] = f"{d.window.size} of steps {first} to {end - 1}"
    return found
