"""Every flow-matching family in miniature: drawn as stock diffusers does, trained, exported.

Random weights, real classes; what differs between families is what the pipeline directory says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import Tensor

from tests.flow_miniatures import MINIATURES, SIDE, Mini, build
from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.diffusion.flow_scheduler import SeededFlowScheduler
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import export_adapter, read_adapter
from texforce_ray.model.backbone import Backbone, load_config_backbone
from texforce_ray.model.flops import pass_flops, sample_flops
from texforce_ray.rl.likelihood import Pairs
from texforce_ray.rl.objectives import make_learner
from texforce_ray.rl.ppo_anchor import Anchor
from texforce_ray.rl.ppo_learner import PpoLearner, trained_steps
from texforce_ray.rl.ppo_totals import Totals
from texforce_ray.rl.sharding import UpdateBatch

PROMPTS = ["a green circle", "two red squares"]
SEEDS = np.array([7, 2**40])
ADVANTAGES = np.array([1.0, -1.0])
STEPS = 5

Family = tuple[str, Mini, Path]


@pytest.fixture(scope="module", params=list(MINIATURES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """(name, how it is drawn, directory) of a miniature."""
    path = tmp_path_factory.mktemp(request.param) / "pipeline"
    with torch.random.fork_rng(devices=[]):
        build(path, request.param)
    return request.param, MINIATURES[request.param], path


def _config(family: Family, **sections: Any) -> Config:
    _, mini, path = family
    adapters = {
        part: {"rank": 2, "alpha": 2.0, "target_modules": modules}
        for part, modules in mini.lora.items()
    }
    absent = {part: None for part in ("text_encoder", "text_encoder_2") if part not in adapters}
    diffusion = {
        "process": "flow", "steps": STEPS, "guidance_scale": mini.guidance, "height": SIDE,
        "width": SIDE, "max_sequence_length": mini.length, "window": {"size": 2, "within": [0, 3]},
    }  # fmt: skip
    values: dict[str, Any] = {
        "iterations": 2,
        "model": {"path": str(path)},
        "lora": absent | adapters | sections.pop("lora", {}),
        "diffusion": diffusion | sections.pop("diffusion", {}),
        "prompts": {"per_iteration": 2, "samples_per_prompt": 1},
        "rollout": {"batch_size": 2},
        "advantage": {"mode": "batch"},
        "update": {"minibatches": 1},
        "optimizer": {"lr": 1e-2, "warmup_fraction": 0.0},
    }
    return make_config(values | sections)


def _stock_pipeline(family: Family) -> Any:
    name, _, path = family
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3_no_t5" else {}
    pipe = DiffusionPipeline.from_pretrained(path, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _stock(pipe: Any, mini: Mini, **scheduler: Any) -> np.ndarray:
    """Images of the stock pipeline with our scheduler."""
    size = (SIDE // 8, SIDE // 8) if mini.family == "flux" else None
    pipe.scheduler = SeededFlowScheduler.of(pipe.scheduler, latent_size=size, **scheduler)
    return _drawn(pipe, mini, pipe.scheduler.generators(SEEDS))


def _drawn(pipe: Any, mini: Mini, generators: list[torch.Generator]) -> np.ndarray:
    images = pipe(
        list(PROMPTS), num_inference_steps=STEPS, height=SIDE, width=SIDE,
        guidance_scale=mini.guidance, max_sequence_length=mini.length, generator=generators,
        output_type="np",
    ).images  # fmt: skip
    return np.round(images * 255).astype(np.uint8)


def _difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def _batch(sampler: Sampler, version: int, keep: np.ndarray | None = None) -> UpdateBatch:
    trajectory, _ = sampler.sample(PROMPTS, SEEDS + version, version, keep)
    return UpdateBatch(trajectory, ADVANTAGES, np.ones(2, dtype=bool))


def test_samples_without_noise_need_nothing_of_ours_in_a_stock_pipeline(family: Family) -> None:
    config = _config(family, diffusion={"eta": 0.0, "window": None}, objective={"kind": "nft"})
    _, images = Sampler.of(load_config_backbone(config, 0), config).sample(PROMPTS, SEEDS, 0)
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in SEEDS]
    assert _difference(images, _drawn(_stock_pipeline(family), family[1], generators)) <= 1


@pytest.mark.parametrize("kernel", ["cps", "flow", "dance"])
def test_samples_with_noise_are_drawn_again_by_our_scheduler(family: Family, kernel: str) -> None:
    config = _config(family, diffusion={"kernel": kernel})
    sampler = Sampler.of(load_config_backbone(config, 0), config).at(config, 1)
    _, images = sampler.sample(PROMPTS, SEEDS, 0)
    stock = _stock(
        _stock_pipeline(family), family[1], kernel=kernel, eta=config.diffusion.eta,
        window=config.window_steps(1),
    )  # fmt: skip
    assert _difference(images, stock) <= 1


@pytest.mark.long
def test_two_iterations_then_export_and_reload(family: Family, tmp_path: Path) -> None:
    _, mini, path = family
    config = _config(family)
    learner = PpoLearner(load_config_backbone(config, 0), config)
    sampler = Sampler.of(learner.backbone, config)
    for iteration in range(2):
        keep = learner.kept_latents(config, learner.process, iteration, 0, 2)
        batch = _batch(sampler.at(config, iteration), iteration, keep)
        assert batch.trajectory.latents.shape[1] == 3  # a window of two steps
        assert learner.update(batch)["ppo/ratio_error_first_pass"] <= 1e-5
    snapshot = learner.learned().snapshot
    for part, tensors in snapshot.adapters.items():
        assert any(v.any() for k, v in tensors.items() if "lora_B" in k), part
    drawing = sampler.drawing(mini.guidance, 0.0)
    _, live = drawing.sample(PROMPTS, SEEDS, 2)
    pipe = _stock_pipeline(family)
    assert _difference(live, _stock(pipe, mini, eta=0.0)) > 0
    folder = tmp_path / "adapter"
    export_adapter(snapshot, folder, str(path), kohya=False)
    pipe.load_lora_weights(folder)
    for part in snapshot.adapters:
        if part not in mini.loadable:  # what diffusers cannot load is a folder for PEFT
            setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), folder / part))
    assert _difference(_stock(pipe, mini, eta=0.0), live) <= 1
    fresh = load_config_backbone(config, 0)
    read = read_adapter(folder)
    Adapter(fresh, read.shapes, seed=9).load_weights(read.adapters)
    _, again = Sampler.of(fresh, config).drawing(mini.guidance, 0.0).sample(PROMPTS, SEEDS, 2)
    assert _difference(again, live) == 0


@pytest.mark.long
@pytest.mark.parametrize(
    "objective",
    [{"kind": "nft"}, {"kind": "awm"}, {"kind": "rwr"}, {"kind": "raft"},
     {"kind": "ppo", "level": "guard"}, {"kind": "ppo", "level": "tempflow", "trust": "kl_mask"},
     {"kind": "ppo", "kl_weight": 0.1}],
    ids=lambda o: "-".join(o.values()) if "kl_weight" not in o else "ppo-kl",
)  # fmt: skip
def test_every_objective_trains_every_part(family: Family, objective: dict[str, Any]) -> None:
    free = {} if objective["kind"] == "ppo" else {"eta": 0.0, "window": None}
    anchors = {"anchor_weight": 0.1, "embedding_anchor_weight": 0.1, "levels": 2}
    given = objective if objective["kind"] == "ppo" else objective | anchors
    config = _config(
        family, objective=given, diffusion=free, learner={"gradient_checkpointing": True}
    )
    learner = make_learner(load_config_backbone(config, 0), config)
    sampler = Sampler.of(learner.backbone, config)
    for iteration in range(2):
        learner.update(_batch(sampler.at(config, iteration), iteration))
    for part, tensors in learner.learned().snapshot.adapters.items():
        assert any(v.any() for k, v in tensors.items() if "lora_B" in k), part


@pytest.mark.long
def test_direct_backpropagation_reaches_every_part(family: Family) -> None:
    config = _config(family, objective={"kind": "direct", "method": "draft", "steps": 2})
    backbone = load_config_backbone(config, 0)

    def red(images: Tensor, prompts: Any) -> Tensor:
        del prompts
        return images[:, 0].mean(dim=(1, 2))

    from texforce_ray.rl.direct_learner import DirectLearner

    learner = DirectLearner(backbone, config, red)
    sampler = Sampler.of(backbone, config)
    learner.update(_batch(sampler.at(config, 0), 0))
    for part, tensors in learner.learned().snapshot.adapters.items():
        assert any(v.any() for k, v in tensors.items() if "lora_B" in k), part


@pytest.mark.long
def test_the_gradient_is_that_of_plain_autograd(
    family: Family, double: None, randomize: Callable[..., None]
) -> None:
    config = _config(family)
    learner = PpoLearner(load_config_backbone(config, 0), config)
    for module in (*learner.backbone.parts().values(), learner.backbone.vae):
        module.double()
    randomize(learner.adapter, seed=1)
    batch = _batch(Sampler.of(learner.backbone, config).at(config, 0), 0)
    for parameter in learner.parameters:  # away from the policy that sampled
        parameter.data = parameter.data * 1.05
    steps = trained_steps(config, learner.process, 0, 2)
    pairs = Pairs.of(np.arange(2), steps)
    anchor = Anchor.of(batch.trajectory.log_probs)
    ours = learner._shard_gradient(
        batch, pairs, anchor, len(pairs), Totals(torch.device("cpu")), plain=True
    )
    plain = _plain_autograd(learner, batch, steps)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
    assert any(g.abs().max() > 1e-6 for g in plain)


def _plain_autograd(learner: PpoLearner, batch: UpdateBatch, steps: np.ndarray) -> list[Tensor]:
    """The same loss with every sample and step in one graph, from tokens to log-probability."""
    backbone, process, trajectory = learner.backbone, learner.process, batch.trajectory
    scale = learner.config.diffusion.guidance_scale
    losses = []
    for row in range(2):
        for index in steps[row]:
            x, following = (
                torch.from_numpy(trajectory.latents[[row], index + i]).double() for i in (0, 1)
            )
            output = _guided(
                backbone, process.timesteps[[index]], x, trajectory.prompts[row], scale
            )
            step = torch.tensor([index])
            log_prob = process.log_prob(step, following, process.mean(step, x, output))
            ratio = (log_prob - float(trajectory.log_probs[row, index])).exp()
            losses.append(-ratio * ADVANTAGES[row])
    # Z-Image reads its encoder's last layer but one: the last one's adapter has no gradient.
    return list(
        torch.autograd.grad(
            torch.cat(losses).mean(), learner.parameters, allow_unused=True, materialize_grads=True
        )
    )


def _guided(backbone: Backbone, t: Tensor, x: Tensor, prompt: str, scale: float) -> Tensor:
    conditioning = backbone.encode(backbone.tokenize([prompt]).ids)
    output = backbone.predict(x, t, backbone.with_guidance(conditioning, scale))
    if backbone.passes(scale) == 1:
        return output
    return backbone.guide(backbone.predict(x, t, backbone.encode_empty()), output, scale)


def test_layers_that_an_encoder_lacks_are_refused(family: Family) -> None:
    """PEFT is content if some of the names match."""
    _, mini, _ = family
    names = [*next(iter(mini.lora.values())), "another_proj"]
    config = _config(family, lora={"text_encoder": {"rank": 2, "target_modules": names}})
    with pytest.raises(ConfigError, match=r"target_modules: 'another_proj' matches no layer"):
        make_learner(load_config_backbone(config, 0), config)


def test_flops_of_every_family_are_counted(family: Family) -> None:
    """As actors do when they start."""
    config = _config(family)
    backbone = load_config_backbone(config, 0)
    once = sample_flops(backbone, 1, 1.0 if family[0] != "z_image" else 0.0)
    assert sample_flops(backbone, 3, config.diffusion.guidance_scale) > once > 0
    assert pass_flops(backbone).backward > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_what_must_stay_in_float32(family: Family, dtype: str) -> None:
    config = _config(family, model={"path": str(family[2]), "dtype": dtype})
    backbone = load_config_backbone(config, 0)
    t5 = [e for e in backbone.text_encoders if type(e).__name__ == "T5EncoderModel"]
    for encoder in t5 if dtype == "float16" else []:
        assert encoder.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == torch.float32
    trajectory, _ = Sampler.of(backbone, config).at(config, 0).sample(PROMPTS, SEEDS, 0)
    assert np.isfinite(trajectory.latents).all()
    assert backbone.denoiser.dtype == getattr(torch, dtype)
