"""Blend adapters without training: `python -m texforce_ray.fuse A B*0.5 --out DIR`.

A and B are adapter directories or LoRA files, of one task each, for the text encoder or the U-Net.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from texforce_ray.console import EXIT_ERROR, exit_code
from texforce_ray.errors import ConfigError
from texforce_ray.paths import local_path, weighted

if TYPE_CHECKING:
    import numpy as np

    from texforce_ray.artifacts.snapshot import PolicySnapshot


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.fuse",
        description="Write the weighted sum of adapters: exact (ranks add up), or compressed to "
        "one rank. Text-encoder and U-Net adapters go into one file that diffusers can load.",
    )
    commands.add_argument(
        "adapters",
        nargs="+",
        metavar="DIR[*WEIGHT]",
        help="e.g. 'runs/hands/adapter*0.5'; an existing path may contain '*'",
    )
    commands.add_argument("--out", type=local_path, required=True, help="directory of the result")
    commands.add_argument("--rank", type=int, help="compress to this rank by SVD; prints the error")
    commands.add_argument(
        "--base", metavar="NAME", help="the base model, if the adapters name several or none"
    )
    commands.add_argument(
        "--merge", metavar="MODEL", help="write a whole pipeline: MODEL with the sum merged into it"
    )
    commands.add_argument(
        "--sweep", type=int, metavar="N", help="also draw a grid over N weights, 0 to the given one"
    )
    commands.add_argument("--model", help="pipeline for --sweep (default: the adapters' base)")
    commands.add_argument(
        "--prompts", nargs="+", default=["a green circle", "a hand"], help="prompts for --sweep"
    )
    commands.add_argument("--steps", type=int, default=20, help="denoising steps for --sweep")
    commands.add_argument("--guidance", type=float, default=3.0, help="guidance for --sweep")
    return commands


def main(given: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(given)
    try:
        return exit_code(lambda: _run(options))
    except OSError as error:  # usually a full disk, met inside a library
        print(f"\nerror: cannot write {options.out}: {error}", file=sys.stderr)
        return EXIT_ERROR


def _run(options: argparse.Namespace) -> None:
    if options.sweep and len(options.adapters) > 2:
        raise ConfigError(
            f"--sweep: takes one or two adapters, not {len(options.adapters)}; leave some out"
        )
    if options.sweep is not None and options.sweep < 1:
        raise ConfigError(f"--sweep: {options.sweep} should be at least 1")
    if options.rank is not None and options.rank < 1:
        raise ConfigError(f"--rank: {options.rank} should be at least 1")
    terms = [weighted(text) for text in options.adapters]
    from texforce_ray.artifacts.location import adapter_files, known_pipeline, layers_per_block
    from texforce_ray.files import check_writable

    for _, path in terms:
        adapter_files(path)
    base = options.base or _base([path for _, path in terms])
    check_writable(options.out)

    from texforce_ray.files import atomic_write_text
    from texforce_ray.model.adapter_files import export_adapter, read_adapter
    from texforce_ray.model.fusion import compress, fuse

    blocks = layers_per_block(base)
    pipeline = known_pipeline(base)
    adapters = [(w, read_adapter(path, None, blocks, pipeline=pipeline)) for w, path in terms]
    result, error = fuse(adapters), 0.0
    exact = {part: shape.rank for part, shape in result.shapes.items()}
    if options.rank is not None:
        result, error = compress(result, options.rank)
    unet = _has_unet(pipeline, adapters, [path for _, path in terms])
    export_adapter(result, options.out, base, kohya=unet)
    summary = {
        "out": str(options.out),
        "base": base,
        "adapters": {str(path): weight for weight, path in terms},
        "rank": {part: shape.rank for part, shape in result.shapes.items()},
        "exact_rank": exact,
        "relative_error": error,
    }
    atomic_write_text(options.out / "fusion.json", json.dumps(summary, indent=2) + "\n")
    for part, shape in result.shapes.items():
        print(f"{part}: rank {shape.rank}, {len(result.adapters[part]) // 2} layers")
    if options.rank is not None:
        print(f"relative error of the compression: {error:.3g}")
    if options.merge:
        _merge(options.merge, result, options.out / "pipeline")
        print(f"merged pipeline: {options.out / 'pipeline'}")
    if options.sweep:
        _sweep(options, adapters, base)
        print(f"sweep: {options.out / 'sweep.png'}")
    print(json.dumps(summary))


def _has_unet(
    pipeline: str | None, adapters: list[tuple[float, PolicySnapshot]], paths: list[Path]
) -> bool:
    """Whether the base is a Stable Diffusion, whose names kohya's file has.

    If the base is not here: by the adapters, whose own exports have that file for U-Nets alone.
    """
    from texforce_ray.artifacts.families import FAMILIES
    from texforce_ray.artifacts.location import KOHYA_FILE
    from texforce_ray.artifacts.snapshot import UNET

    if pipeline is not None:
        return FAMILIES[pipeline].denoiser == UNET
    parts = [UNET in adapter.adapters for _, adapter in adapters]
    files = [path.is_file() or (path / KOHYA_FILE).is_file() for path in paths]
    return all(map(any, zip(parts, files, strict=True)))


def _base(paths: list[Path]) -> str:
    """The one base model that the adapters name, or "unknown".

    Raises:
        ConfigError: they name several.
    """
    from texforce_ray.artifacts.location import base_of

    bases = {base: path for path in paths if (base := base_of(path)) is not None}
    if len(bases) > 1:
        found = "; ".join(f"{path} of {base}" for base, path in bases.items())
        raise ConfigError(
            f"the adapters belong to different base models: {found}; if these are names of one "
            "model, choose one with --base NAME"
        )
    return next(iter(bases), "unknown")


def _merge(model: str, adapter: PolicySnapshot, out: Path) -> None:
    """Write the base pipeline, updates added to its weights, as a stock pipeline directory."""
    from safetensors import SafetensorError

    from texforce_ray.model.backbone import load_backbone
    from texforce_ray.model.fusion import merge

    backbone = load_backbone(model)
    modules = backbone.parts()
    if unknown := adapter.adapters.keys() - modules.keys():
        raise ConfigError(f"--merge: {model} has no {', '.join(sorted(unknown))}")
    for part in adapter.adapters:
        merge(adapter, part, modules[part], "the sum", model)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        backbone.pipe.save_pretrained(partial, safe_serialization=True)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--merge: cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(
    options: argparse.Namespace, adapters: list[tuple[float, PolicySnapshot]], base: str
) -> None:
    """Draw the paper's Fig. 12, one seed under all blends: a row for one adapter, else a square."""
    import numpy as np

    from texforce_ray.diffusion.sampler import Sampler
    from texforce_ray.model.adapter import Adapter
    from texforce_ray.model.backbone import load_backbone
    from texforce_ray.model.fusion import fuse
    from texforce_ray.records.images import grid, save_png

    backbone = load_backbone(options.model or base)
    sampler = Sampler(backbone, steps=options.steps, eta=0.0, guidance_scale=options.guidance)
    factors = np.linspace(0.0, 1.0, options.sweep)
    images: list[np.ndarray] = []
    titles: list[str] = []
    for prompt in options.prompts:
        for outer in factors if len(adapters) == 2 else [1.0]:
            for inner in factors:
                weights = [outer, inner] if len(adapters) == 2 else [inner]
                blend = fuse([(w * f, a) for (w, a), f in zip(adapters, weights, strict=True)])
                adapter = Adapter(backbone, blend.shapes, seed=0)
                adapter.load_weights(blend.adapters)
                images += list(sampler.sample([prompt], np.array([0]), 0)[1])
                adapter.remove()
                titles.append(f"{prompt}: {', '.join(f'{w:.2f}' for w in weights)}")
    picture = grid(np.stack(images), options.sweep, titles=titles, header="weights of the blend")
    save_png(options.out / "sweep.png", picture)


if __name__ == "__main__":
    sys.exit(main())
