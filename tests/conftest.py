"""A miniature of Stable Diffusion that every test may load: real classes, random weights."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a randomly initialised StableDiffusionPipeline: 64 x 64 images."""
    import torch

    from texforce_ray.shapes import captions, networks, pretrain
    from texforce_ray.shapes.tokenizer import build_tokenizer

    path = tmp_path_factory.mktemp("tiny") / "pipeline"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae, unet = networks.build_vae(), networks.build_unet()
        tokenizer = build_tokenizer(captions.vocabulary())
        text_encoder = networks.build_text_encoder(tokenizer)
        pretrain.export(path, vae, unet, text_encoder, tokenizer, 1.0, pretrain.Recipe())
    return path
