"""Two adapters in stock diffusers, mixed while drawing. Does not need this package.

    python examples/blend_adapters.py texforce_ray/shapes/weights runs/A/adapter runs/B/adapter \
        --weights 1.0 0.5 --prompt "three red squares" --out blend.png

Both adapters must be for this base model. The images show the exact sum of the two updates. To keep
a blend as an adapter of its own: python -m texforce_ray.fuse runs/A/adapter 'runs/B/adapter*0.5'
--out blend.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image


def main(arguments: list[str] | None = None) -> None:
    """Draw a row of images for each setting: base, first, second, both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="directory or hub id of the base pipeline")
    parser.add_argument("adapters", nargs=2, metavar="ADAPTER", help="folders of exported adapters")
    parser.add_argument("--weights", nargs=2, type=float, default=[1.0, 1.0])
    parser.add_argument("--prompt", default="three red squares")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--out", default="blend.png")
    options = parser.parse_args(arguments)

    pipe = StableDiffusionPipeline.from_pretrained(options.base, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # as in training
    pipe.set_progress_bar_config(disable=True)
    names = ("first", "second")
    for name, folder in zip(names, options.adapters, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)

    def draw() -> list[Image.Image]:
        """The same seeds every time, so that only the adapters differ."""
        generators = [torch.Generator("cpu").manual_seed(i) for i in range(options.images)]
        return pipe(
            [options.prompt] * options.images,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            eta=1.0,
            generator=generators,
        ).images

    rows = []
    pipe.disable_lora()
    rows.append(draw())
    pipe.enable_lora()
    first, second = options.weights
    for weights in ([first, 0.0], [0.0, second], [first, second]):
        pipe.set_adapters(list(names), weights)
        rows.append(draw())

    width, height = rows[0][0].size
    picture = Image.new("RGB", (width * options.images, height * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            picture.paste(image, (x * width, y * height))
    picture.save(options.out)
    print(f"{options.out}: rows are base, first, second, both")


if __name__ == "__main__":
    main()
