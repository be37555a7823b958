"""Run by the interpreter of each environment: images of what is exported, through its own loaders.

draw.py PIPELINE ADAPTER OUT: PIPELINE with nothing, with each file of the directory ADAPTER through
`load_lora_weights`, and with its PEFT folders; OUT is an npz. Needs stock libraries alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel

PROMPTS, SEEDS = ["a green circle", "two red squares"], [1, 22]


def load(pipeline: str) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> np.ndarray:
    images = pipe(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=3.0,
        eta=1.0,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        output_type="np",
    ).images
    return np.round(images * 255).astype(np.uint8)


def main(pipeline: str, adapter: str, out: str) -> None:
    torch.set_num_threads(1)
    images = {"base": draw(load(pipeline))}
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        pipe = load(pipeline)
        pipe.load_lora_weights(adapter, weight_name=name)
        images[name] = draw(pipe)
    pipe = load(pipeline)
    for part in ("text_encoder", "unet"):
        folder = Path(adapter) / part
        if not folder.is_dir() and part == "text_encoder":
            folder = Path(adapter)
        if folder.is_dir():
            setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), str(folder)))
    images["PEFT"] = draw(pipe)
    np.savez(out, **images)


if __name__ == "__main__":
    main(*sys.argv[1:])
