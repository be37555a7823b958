"""A miniature of Stable Diffusion that every test may load: real classes, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

LIGHT = ("tests/unit/", "tests/records/")
NEEDS = {
    **dict.fromkeys(("chaos", "cluster", "docs", "fuzz", "observability", "system"), "ray"),
    **dict.fromkeys(("compat", "packaging"), "network"),
    "rewards": "ray network",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what a folder's tests need: see CONTRIBUTING.md."""
    for item in items:
        for name in NEEDS.get(item.nodeid.split("/")[1], "").split():
            item.add_marker(name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers, each has whole systems of its own; `ray start` is used by one alone."""
    from xdist.scheduler import LoadScopeScheduling

    class Systems(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.startswith(LIGHT):
                return file
            ours = file.startswith("tests/system/") and not file.endswith("test_job.py")
            return "runs" if ours else "clusters"

    return Systems(config, log)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a randomly initialised StableDiffusionPipeline: 64 x 64 images."""
    import torch

    from texforce_ray.shapes import captions, networks
    from texforce_ray.shapes.pretraining import export
    from texforce_ray.shapes.recipe import Recipe
    from texforce_ray.shapes.tokenizer import build_tokenizer

    path = tmp_path_factory.mktemp("tiny") / "pipeline"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae, unet = networks.build_vae(), networks.build_unet()
        tokenizer = build_tokenizer(captions.vocabulary())
        text_encoder = networks.build_text_encoder(tokenizer)
        export(path, vae, unet, text_encoder, tokenizer, 1.0, Recipe())
    return path
