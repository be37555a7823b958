"""The README.md that lies beside an exported adapter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TAGS = ("text-to-image", "stable-diffusion", "lora", "texforce", "reinforcement-learning")


@dataclass(frozen=True)
class ModelCardInfo:
    """What a reader of the card wants to know.

    Attributes:
        base_model: hub id or path of the pipeline that the adapter belongs to.
        parts: adapted components in the pipeline's names, e.g. `("text_encoder",)`.
        rank: LoRA rank.
        alpha: LoRA alpha.
        rewards: name and weight of each reward.
        iterations: PPO iterations trained.
        samples: images sampled in all.
        settings: further settings to list.
        scores: per reward "base", "tuned", "difference", "low", "high", "images"; may be empty.
        has_unet: whether the adapter changes the U-Net too.
        evaluated_on: which prompts and seeds gave the scores.
    """

    base_model: str
    parts: tuple[str, ...]
    rank: int
    alpha: float
    rewards: tuple[tuple[str, float], ...]
    iterations: int
    samples: int
    settings: Mapping[str, object]
    scores: Mapping[str, Mapping[str, Any]]
    has_unet: bool
    evaluated_on: str = "held-out prompts"

    @property
    def components(self) -> tuple[str, ...]:
        """The adapted components, the U-Net among them if there is one."""
        return self.parts + (("unet",) if self.has_unet and "unet" not in self.parts else ())


def model_card(info: ModelCardInfo) -> str:
    """Return the card as Markdown with YAML front matter, as the Hugging Face hub reads it."""
    sections = (_front_matter(info), _summary(info), _usage(info), _training(info), _scores(info))
    return "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(info: ModelCardInfo) -> str:
    lines = ["---", "library_name: peft", "pipeline_tag: text-to-image"]
    # The hub refuses a card whose base_model is a path; the text below names it anyway.
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", info.base_model):
        lines.append(f"base_model: {json.dumps(info.base_model)}")  # JSON strings are YAML
    lines += ["tags:", *(f"- {tag}" for tag in _TAGS), "---"]
    return "\n".join(lines)


def _summary(info: ModelCardInfo) -> str:
    named = ", ".join(f"`{name}`" for name, _ in info.rewards) or "no reward"
    parts = " and ".join(f"`{part}`" for part in info.components)
    return (
        f"# TexForce adapter for {_inline(info.base_model)}\n\n"
        f"A LoRA adapter on {parts}, trained by reinforcement learning "
        f"([TexForce](https://arxiv.org/abs/2311.15657), PPO) on {named}. "
        "The weights of the base model are unchanged."
    )


def _usage(info: ModelCardInfo) -> str:
    several = len(info.components) > 1
    attach = [
        f"pipe.{part} = PeftModel.from_pretrained(pipe.{part}, adapter"
        + (f', subfolder="{part}")' if several else ")")
        for part in info.components
    ]
    base = json.dumps(info.base_model)
    opening = (
        f"pipe = DiffusionPipeline.from_pretrained({base})",
        'adapter = "."  # the directory of this file',
    )
    diffusers = ("from diffusers import DiffusionPipeline", "", *opening)
    peft = ("from diffusers import DiffusionPipeline", "from peft import PeftModel", "", *opening)
    draw = 'image = pipe("a photo of a cat").images[0]'
    return "\n\n".join(
        (
            "## Use",
            "With diffusers:",
            _python(*diffusers, "pipe.load_lora_weights(adapter)", draw),
            "With PEFT, for example to merge or to train on:",
            _python(*peft, *attach, draw),
        )
    )


def _training(info: ModelCardInfo) -> str:
    rows: list[tuple[str, object]] = [("LoRA rank", info.rank), ("LoRA alpha", info.alpha)]
    rows += [(f"Weight of reward {name}", weight) for name, weight in info.rewards]
    rows += [("PPO iterations", info.iterations), ("Images sampled", info.samples)]
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
    return f"## Scores\n\nOn {_inline(info.evaluated_on)}.\n\n" + "\n".join(lines)


def _python(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))


def _inline(value: object) -> str:
    """Return `value` in one line that Markdown and HTML leave as it is."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", text)


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:.4g}"
