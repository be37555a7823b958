"""torch.compile by blocks: what is compiled, how often, and that nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.flow_miniatures import build as build_flow
from tests.unit.learners import ADVANTAGES, batch_of, configured, sample, weights_of
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import Backbone, load_backbone
from texforce_ray.model.compiling import outermost
from texforce_ray.model.conditioning import Drawing
from texforce_ray.model.flops import pass_flops, sample_flops
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.sharding import UpdateBatch

pytestmark = pytest.mark.long

VAE_BLOCKS = 9  # of the miniatures: attention, the last norm, and a ResNet block for each shape
SEEDS = np.arange(4)
PROMPTS = (["a"] * 4, ["a", "b", "a", "b"], ["a", "b", "c", "d"], ["a", "a", "a", "b"])


class Graphs(list[torch.fx.GraphModule]):
    """A backend that compiles nothing and keeps what it is given."""

    def __call__(self, module: torch.fx.GraphModule, _: Any) -> Any:
        self.append(module)
        return module.forward


def compiled(backbone: Backbone) -> Graphs:
    torch._dynamo.reset()
    graphs = Graphs()
    backbone.compile(backend=graphs)
    return graphs


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_unets_blocks_of_a_kind_share_their_code_whatever_the_prompts_are(
    pipelines: dict[str, Path], family: str
) -> None:
    backbone, plain = (load_backbone(str(pipelines[family])) for _ in range(2))
    graphs = compiled(backbone)
    sampler, eager = (
        Sampler(each, steps=2, eta=1.0, guidance_scale=3.0) for each in (backbone, plain)
    )
    seen = []
    for prompts in PROMPTS:
        images = sampler.sample(prompts, SEEDS, 0)[1]
        assert np.abs(images.astype(int) - eager.sample(prompts, SEEDS, 0)[1]).max() <= 1
        seen.append(len(graphs))
    assert seen == [seen[0]] * len(PROMPTS)
    # Each cross-attention layer has keys and values of its own, and yet no code of its own.
    blocks = list(outermost(backbone.denoiser, ("BasicTransformerBlock",)))
    code = [g for g in graphs if "scaled_dot_product" in str(g.graph)]
    widths = {block.norm1.normalized_shape for block in blocks}
    assert len(code) - 1 == len(widths) < len(blocks)  # and the VAE's


@pytest.mark.parametrize("family", ["sd3", "flux_dev"])
def test_each_kind_of_a_transformers_blocks_is_compiled_once(family: str, tmp_path: Path) -> None:
    """Not the whole transformer, which takes minutes; and not again for each block or prompt."""
    build_flow(tmp_path, family)
    drawing = Drawing(height=64, width=64, max_sequence_length=32)
    backbone, plain = (load_backbone(str(tmp_path), drawing=drawing) for _ in range(2))
    for each in (backbone, plain):
        for name, blocks in each.denoiser.named_children():  # more of each kind
            for _ in range(3 * name.endswith("transformer_blocks")):
                blocks.insert(0, copy.deepcopy(blocks[0]))
    # SD3's last block ignores the text. FLUX has blocks of two classes, and one of them is compiled
    # again for the memory layout of what a block of the other class gives it.
    kinds, graphs = {"sd3": 2, "flux_dev": 3}[family], compiled(backbone)
    sampler, eager = (
        Sampler(each, steps=2, eta=0.8, guidance_scale=1.0) for each in (backbone, plain)
    )
    for prompts in PROMPTS:
        images = sampler.sample(prompts, SEEDS, 0)[1]
        assert np.array_equal(images, eager.sample(prompts, SEEDS, 0)[1])
        assert len(graphs) == kinds + VAE_BLOCKS


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("microbatch_size", "rows"), [(8, 8), (9, 10), (64, 12)])
def test_a_rest_of_a_minibatch_needs_no_code_of_its_own(
    pipelines: dict[str, Path], checkpointing: bool, microbatch_size: int, rows: int
) -> None:
    """12 pairs, then the 9 that a mask leaves: all in batches of one size."""
    config = configured(
        learner={"microbatch_size": microbatch_size, "gradient_checkpointing": checkpointing}
    )
    plain = PpoLearner(load_backbone(str(pipelines["sd15"])), config)
    learner = PpoLearner(load_backbone(str(pipelines["sd15"])), config)
    graphs, seen = compiled(learner.backbone), set()
    learner.backbone.denoiser.register_forward_pre_hook(lambda _, given: seen.add(len(given[0])))
    three = np.array([True, True, True, False])
    counts = []
    for mask in (np.ones(4, dtype=bool), three):
        trajectory = sample(plain)
        batch = UpdateBatch(trajectory, np.where(mask, ADVANTAGES, 0.0), mask)
        metrics = learner.update(batch)
        expected = plain.update(batch)
        assert metrics["ppo/trained_pairs"] == expected["ppo/trained_pairs"] == 3 * mask.sum()
        assert metrics["learner/grad_norm"] == pytest.approx(
            expected["learner/grad_norm"], rel=1e-3
        )
        counts.append(len(graphs))
    assert 0 < counts[0] == counts[1]
    assert seen == {2 * rows}, "with and without the prompt"
    for key, value in weights_of(plain).items():
        np.testing.assert_allclose(weights_of(learner)[key], value, atol=1e-5, err_msg=key)


def test_a_machine_without_a_compiler_is_named_before_the_first_batch(
    pipelines: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backbone = load_backbone(str(pipelines["sd15"]))
    monkeypatch.delenv("CXX", raising=False)
    with monkeypatch.context() as empty:
        empty.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match=r"model\.compile: true, .* has no g\+\+; install"):
            backbone.compile()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no no-such-compiler; .*CXX"):
        backbone.compile()
    assert not backbone.compiled


def test_blocks_that_a_denoiser_does_not_have_are_named(
    pipelines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(str(pipelines["sd15"]))
    monkeypatch.setattr(type(backbone), "blocks", ("transformer_blocks",))
    with pytest.raises(ConfigError, match="UNet2DConditionModel has no transformer_blocks, which"):
        backbone.compile(backend="eager")


def test_what_is_computed_once_is_not_compiled(pipelines: dict[str, Path]) -> None:
    """Counts of FLOPs and the gradient's check have batches of a size of their own."""
    half = load_backbone(str(pipelines["sd15"]), dtype="bfloat16")
    learner = PpoLearner(half, configured(model={"dtype": "bfloat16"}))
    graphs = compiled(half)
    sample_flops(half, 4, 3.0)
    pass_flops(half, decoder=True)
    with half.eager():
        trajectory = sample(learner)
    assert not graphs
    batch = batch_of(trajectory)
    steps = np.tile(np.array(learner.process.trainable), (4, 1))
    checked = learner.check_gradient(batch, lambda: learner._probe(batch, np.arange(4), steps))
    assert checked["learner/gradient_agreement"] > 0.9
    assert half.compiled
    found = len(graphs)
    assert found, "it is the compiled gradient that is checked"
    learner.update(batch)
    assert len(graphs) == found, "in batches of the size that is trained"
