"""The model card: the README.md beside an exported adapter."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from texforce_ray.artifacts.families import tokenizer_of
from texforce_ray.artifacts.location import pipeline_class
from texforce_ray.artifacts.snapshot import TEXT_ENCODERS
from texforce_ray.records.card_info import BaseModel, ModelCardInfo

_TAGS = ("text-to-image", "lora", "texforce", "reinforcement-learning")
# What reads each exported file; versions are the oldest that were tested.
_FILES = (
    ("pytorch_lora_weights.safetensors", "diffusers 0.31 or newer: `pipe.load_lora_weights`"),
    ("adapter_config.json", "PEFT 0.13 or newer: `PeftModel.from_pretrained`"),
    ("adapter_model.safetensors", "the same; holds the weights"),
    ("kohya.safetensors", "ComfyUI, A1111 and others that read LoRAs in kohya's format"),
)


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
    if not info.base.path.startswith("embedded") and re.fullmatch(
        r"\w[\w.-]*(/\w[\w.-]*)?", info.base.path
    ):
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
    if info.base.denoiser_adapters:
        merged = ", ".join(_inline(path) for path in info.base.denoiser_adapters)
        text += (
            f" It was trained with these LoRAs merged into the denoiser: {merged}. Merge them "
            "first to see the images that it was trained on; the code below does not do this."
        )
    return text


def _usage(info: ModelCardInfo) -> str:
    attach = {}
    for part in info.shapes:
        inside = any(name.startswith(f"{part}/") for name in info.files)
        folder = f', subfolder="{part}"' if inside else ""
        attach[part] = f"pipe.{part} = PeftModel.from_pretrained(pipe.{part}, adapter{folder})"
    imports, opening = _opening(info.base, info.flow)
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
        loaders = [*imports, *([peft] if beside else [])]
        sections += [title, _python(*loaders, "", *opening, load, *beside, *last)]
    return "\n\n".join(
        (
            *sections,
            "With PEFT, for example to merge it or to continue training:",
            _python(*imports, peft, "", *opening, *attach.values(), *last),
        )
    )


def _opening(base: BaseModel, flow: bool) -> tuple[list[str], list[str]]:
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
    if base.denoiser is not None:
        part, kind_of = _denoiser(flow)
        imports[0] += f", {kind_of}"
        inside = (Path(base.denoiser).expanduser() / part / "config.json").is_file()
        folder = f', subfolder="{part}"' if inside else ""
        lines.append(f"{part} = {kind_of}.from_pretrained({json.dumps(base.denoiser)}{folder})")
        given.append(f"{part}={part}")
    return imports, [*lines, f"pipe = {kind}.{method}({', '.join(given)})"]


def _denoiser(flow: bool) -> tuple[str, str]:
    """Name and class of the pipeline's denoiser; diffusers knows which transformer it is."""
    return ("transformer", "AutoModel") if flow else ("unet", "UNet2DConditionModel")


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
