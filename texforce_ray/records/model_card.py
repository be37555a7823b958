"""The model card: the README.md beside an exported adapter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from texforce_ray.artifacts.families import tokenizer_of
from texforce_ray.artifacts.location import absent_encoders, pipeline_class
from texforce_ray.artifacts.snapshot import TEXT_ENCODERS, LoraShape
from texforce_ray.config import Config, CustomObjective, DirectObjective, PpoObjective

_TAGS = ("text-to-image", "lora", "texforce", "reinforcement-learning")
# What reads each exported file; versions are the oldest that were tested.
_FILES = (
    ("pytorch_lora_weights.safetensors", "diffusers 0.31 or newer: `pipe.load_lora_weights`"),
    ("adapter_config.json", "PEFT 0.13 or newer: `PeftModel.from_pretrained`"),
    ("adapter_model.safetensors", "the same; holds the weights"),
    ("kohya.safetensors", "ComfyUI, A1111 and others that read LoRAs in kohya's format"),
)


@dataclass(frozen=True)
class BaseModel:
    """The pipeline that an adapter belongs to, as named by `model` in the run's config."""

    path: str
    revision: str | None = None
    variant: str | None = None
    unet: str | None = None
    unet_adapters: tuple[str, ...] = ()
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
            m.unet,
            m.unet_adapters,
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
                "height", "width", "clip_skip", "negative_prompt", "max_sequence_length",
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


def model_card(info: ModelCardInfo) -> str:
    """Return the card as Markdown with YAML front matter, as the Hugging Face hub reads it."""
    sections = (
        _front_matter(info),
        _summary(info),
        _usage(info),
        _listed_files(info),
        _training(info),
        _scores(info),
    )
    return "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(info: ModelCardInfo) -> str:
    lines = ["---", "library_name: peft", "pipeline_tag: text-to-image"]
    # The hub rejects a card whose base_model is a path; the text below names it anyway.
    if not info.base.path.startswith("embedded") and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", info.base.path):
        lines.append(f"base_model: {json.dumps(info.base.path)}")  # JSON strings are YAML
    xl = TEXT_ENCODERS[1] in info.shapes
    kind = "stable-diffusion-xl" if xl else "stable-diffusion"
    tags = (*_TAGS, "flow-matching" if info.flow else kind)
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _summary(info: ModelCardInfo) -> str:
    named = ", ".join(f"`{name}`" for name, _ in info.rewards) or "no reward"
    parts = " and ".join(f"`{part}`" for part in info.shapes)
    how = "by reinforcement learning (PPO)" if info.method == "PPO" else f"by {info.method}"
    text = (
        f"# TexForce adapter for {_inline(info.base.path)}\n\n"
        f"A LoRA adapter on {parts}, trained {how} on {named} with "
        "[TexForce](https://arxiv.org/abs/2311.15657)'s code. "
        "The weights of the base model are unchanged."
    )
    if info.base.unet_adapters:
        merged = ", ".join(_inline(path) for path in info.base.unet_adapters)
        text += (
            f" It was trained with these LoRAs merged into the U-Net: {merged}. Merge them first "
            "to see the images that it was trained on; the code below does not do this."
        )
    return text


def _usage(info: ModelCardInfo) -> str:
    attach = {}
    for part in info.shapes:
        inside = any(name.startswith(f"{part}/") for name in info.files)
        folder = f', subfolder="{part}"' if inside else ""
        attach[part] = f"pipe.{part} = PeftModel.from_pretrained(pipe.{part}, adapter{folder})"
    imports, opening = _opening(info.base)
    opening = [*opening, 'adapter = "."  # the directory of this file']
    given = "".join(f", {name}={_literal(value)}" for name, value in info.drawing.items())
    draw = f'image = pipe("a photo of a cat"{given}).images[0]'
    load = "pipe.load_lora_weights(adapter)"
    last = [draw]
    if "clip_skip" in info.drawing and TEXT_ENCODERS[1] not in info.shapes:
        # diffusers 0.42 and older look for an attribute that transformers 5.6 and newer lack.
        last = [
            'if not hasattr(pipe.text_encoder, "text_model"):  # clip_skip with transformers 5.6',
            '    pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder',
            draw,
        ]
    peft = "from peft import PeftModel"
    sections = ["## Use"]
    if "pytorch_lora_weights.safetensors" in info.files or not info.files:
        beside = [attach[part] for part in info.apart]
        title = "With diffusers:"
        if beside:
            named = " and ".join(f"`{part}`" for part in info.apart)
            title = f"With diffusers, whose LoRA loader does not reach {named}:"
        given = [*imports, *([peft] if beside else [])]
        sections += [title, _python(*given, "", *opening, load, *beside, *last)]
    return "\n\n".join(
        (
            *sections,
            "With PEFT, for example to merge it or to continue training:",
            _python(*imports, peft, "", *opening, *attach.values(), *last),
        )
    )


def _opening(base: BaseModel) -> tuple[list[str], list[str]]:
    """Imports, and the lines that load the pipeline that the adapter was trained on."""
    imports, lines = ["from diffusers import DiffusionPipeline"], []
    kind, method, given = "DiffusionPipeline", "from_pretrained", [json.dumps(base.path)]
    if base.single_file_config is not None:
        kind, method = pipeline_class(Path(base.single_file_config)), "from_single_file"
        imports = [f"from diffusers import {kind}"]
        given.append(f"config={json.dumps(base.single_file_config)}")
    if base.path.startswith("embedded"):
        imports.append("from texforce_ray.artifacts.location import locate_model")
        given = [f"locate_model({json.dumps(base.path)})"]
    for name in ("revision", "variant"):
        if value := getattr(base, name):
            given.append(f"{name}={json.dumps(value)}")
    given += [f"{part}=None" for name in base.absent for part in (name, tokenizer_of(name))]
    if base.unet is not None:
        imports[0] += ", UNet2DConditionModel"
        inside = (Path(base.unet).expanduser() / "unet" / "config.json").is_file()
        folder = ', subfolder="unet"' if inside else ""
        lines.append(
            f"unet = UNet2DConditionModel.from_pretrained({json.dumps(base.unet)}{folder})"
        )
        given.append("unet=unet")
    return imports, [*lines, f"pipe = {kind}.{method}({', '.join(given)})"]


def _literal(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _listed_files(info: ModelCardInfo) -> str:
    lines = ["| File | Read by |", "| --- | --- |"]
    for name, readers in _FILES:
        found = [file for file in info.files if file.rpartition("/")[2] == name]
        if found:
            lines.append(f"| {', '.join(f'`{file}`' for file in found)} | {readers} |")
    return "## Files\n\n" + "\n".join(lines) if len(lines) > 2 else ""


def _training(info: ModelCardInfo) -> str:
    rows: list[tuple[str, object]] = []
    for part, shape in info.shapes.items():
        rows.append((f"LoRA of {part}", f"rank {shape.rank}, alpha {shape.alpha:g}"))
    rows += [(f"Weight of reward {name}", weight) for name, weight in info.rewards]
    rows += [("Iterations", info.iterations), ("Images sampled", info.samples)]
    rows += list(info.settings.items())
    lines = ["| Setting | Value |", "| --- | --- |"]
    lines += [f"| {_inline(name)} | {_inline(value)} |" for name, value in rows]
    return "## Training\n\n" + "\n".join(lines)


def _scores(info: ModelCardInfo) -> str:
    if not info.scores:
        return ""
    lines = [
        "| Reward | Base | Tuned | Difference | 95 % interval | Images |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, score in info.scores.items():
        shown = [_number(score.get(key)) for key in ("base", "tuned", "difference")]
        interval = f"{_number(score.get('low'))} to {_number(score.get('high'))}"
        cells = (_inline(name), *shown, interval, _number(score.get("images")))
        lines.append(f"| {' | '.join(cells)} |")
    where = (
        f"On {_inline(info.evaluated_on)}. Intervals are bootstraps over prompts, each with all "
        "of its images, or over images if all have one prompt."
    )
    return f"## Scores\n\n{where}\n\n" + "\n".join(lines)


def _python(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))


def _inline(value: object) -> str:
    """Return `value` as one line, escaped for Markdown and HTML."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", text)


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:.4g}"
