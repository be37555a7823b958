"""A saved pipeline's text encoder and tokenizer as older versions of transformers read them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def name_as_older_versions_do(file: Path) -> None:
    """Put `text_model.` before the keys of CLIP's layers, and take it from the projection's.

    transformers before 5.6 reads no others and would leave the encoder random; later ones read
    both.
    """
    named = {}
    for key, value in load_file(file).items():
        plain = key.removeprefix("text_model.")
        named[plain if plain.startswith("text_projection.") else f"text_model.{plain}"] = value
    save_file(named, file, metadata={"format": "pt"})


def write_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt: before transformers 5, CLIPTokenizer reads only these."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    lines = "\n".join(["#version: 0.2", *merges])
    (folder / "merges.txt").write_text(lines + "\n", encoding="utf-8")
