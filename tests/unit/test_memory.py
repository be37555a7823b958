"""Memory from shapes alone: published sizes, meta runs against real ones, the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from texforce_ray.artifacts.families import FAMILIES
from texforce_ray.capacity import main
from texforce_ray.config.io import load_config
from texforce_ray.model import memory
from texforce_ray.model.conditioning import Drawing
from texforce_ray.model.memory import (
    Ledger,
    LiveBytes,
    Memory,
    SavedBytes,
    Workload,
    fused_attention,
    measure,
)
from texforce_ray.model.published import PUBLISHED, Blueprint, build

SIZES = {
    ("sd3.5-medium", "transformer"): 2.24e9,
    ("sd3.5-medium", "text_encoder"): 0.1237e9,
    ("sd3.5-medium", "text_encoder_2"): 0.695e9,
    ("sd3.5-medium", "text_encoder_3"): 4.76e9,
    ("sd3.5-large", "transformer"): 8.06e9,
    ("flux.1-dev", "transformer"): 11.9e9,
    ("flux.1-schnell", "transformer"): 11.9e9,
    ("flux.1-dev", "text_encoder"): 0.123e9,
    ("flux.1-dev", "text_encoder_2"): 4.76e9,
    ("sd1.5", "unet"): 0.86e9,
    ("sd1.5", "vae"): 83.65e6,
    ("sdxl", "unet"): 2.57e9,
    ("z-image", "transformer"): 6.15e9,
    ("z-image", "text_encoder"): 4.02e9,
}
SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 32,
    "caption_projection_dim": 32, "pooled_projection_dim": 32, "pos_embed_max_size": 16,
    "qk_norm": "rms_norm", "dual_attention_layers": (0,),
}  # fmt: skip
UNET = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 16,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32,
    "attention_head_dim": 4,
}  # fmt: skip
CLIP = {
    "vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 7, "projection_dim": 16,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "shift_factor": 0.1,
}  # fmt: skip
SMALL = Blueprint(
    FAMILIES["StableDiffusion3Pipeline"],
    {
        "text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": T5, "transformer": SD3,
        "vae": VAE,
    },
)  # fmt: skip


@pytest.mark.parametrize("model", list(PUBLISHED))
def test_published_models_have_their_known_sizes(model: str) -> None:
    backbone = build(PUBLISHED[model], "bfloat16", Drawing())
    for (name, part), size in SIZES.items():
        if name == model:
            found = sum(p.numel() for p in getattr(backbone.pipe, part).parameters())
            assert found == pytest.approx(size, rel=0.02), part


def _sd3(device: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    with torch.device(device):
        module = SD3Transformer2DModel(**SD3).requires_grad_(False)
        given = {
            "hidden_states": torch.zeros(2, 4, 8, 8),
            "timestep": torch.zeros(2),
            "encoder_hidden_states": torch.zeros(2, 5, 32, requires_grad=True),
            "pooled_projections": torch.zeros(2, 32),
        }
    return module, lambda: module(**given).sample


def _unet(device: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    with torch.device(device):
        module = UNet2DConditionModel(**UNET).requires_grad_(False)
        given = torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 5, 32, requires_grad=True)
    return module, lambda: module(*given).sample


NETWORKS = pytest.mark.parametrize("network", [_sd3, _unet])
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True])


def _counted(network: Any, device: str, checkpointing: bool, *, live: bool) -> list[int]:
    """What the forward pass keeps and, if `live`, the peaks of it and of the backward pass."""
    module, forward = network(device)
    if checkpointing:
        module.enable_gradient_checkpointing()
    saved, alive = Ledger([module]), Ledger([module])
    with ExitStack() as stack:
        stack.enter_context(fused_attention())
        if live:
            stack.enter_context(LiveBytes(alive, torch.device(device)))
        with SavedBytes(saved):
            output = forward()
        found = [saved.now, alive.peak]
        output.sum().backward()
        del output
    # The embeddings' gradient is left, and the inputs, which were seen through views of them.
    assert not live or alive.now == 2 * (2 * 5 * 32 * 4) + 2 * 4
    assert saved.now in (0, 2 * 5 * 32 * 4)  # a checkpoint keeps its inputs
    return [*found, alive.peak]


@NETWORKS
@CHECKPOINTING
def test_what_autograd_keeps_is_counted_on_meta_as_on_a_device(
    network: Any, checkpointing: bool
) -> None:
    real, _, _ = _counted(network, "cpu", checkpointing, live=False)
    meta, *_ = _counted(network, "meta", checkpointing, live=True)
    assert meta == real > 0


@NETWORKS
@CHECKPOINTING
def test_peaks_are_counted_on_meta_as_on_a_device(network: Any, checkpointing: bool) -> None:
    _, *real = _counted(network, "cpu", checkpointing, live=True)
    _, *meta = _counted(network, "meta", checkpointing, live=True)
    assert meta == real


def test_a_tensor_counts_once_and_until_it_is_gone() -> None:
    module, ledger = torch.nn.Linear(4, 4), Ledger([])
    with LiveBytes(ledger, torch.device("cpu")):
        one = torch.zeros(10)
        view = one[2:]
        assert ledger.now == 40
        del one
        assert ledger.now == 40  # the view holds all of it
        del view
        assert ledger.now == 0
    own = Ledger([module])
    with LiveBytes(own, torch.device("cpu")):
        module.weight.detach().t()
    assert own.peak == 0
    assert ledger.peak == 40


def test_attention_on_meta_keeps_no_scores() -> None:
    query = torch.zeros(1, 2, 64, 8, device="meta", requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    ledger = Ledger([])
    with fused_attention(), SavedBytes(ledger):
        output = attend(query, query, query)
    assert ledger.now == 2 * query.nbytes + 2 * 64 * 4  # input, output, one number for each row
    assert output.shape == query.shape


@cache
def _measured(**options: Any) -> dict[str, Memory]:
    load = Workload(
        **{"batch_size": 4, "microbatch_size": 16, "prompts": 2, "max_sequence_length": 5} | options
    )
    return {role.role: role for role in measure(SMALL, load)}


def test_the_roles_add_up() -> None:
    roles = _measured()
    rollout, learner = roles["rollout"], roles["learner"]
    assert list(rollout.weights) == FAMILIES["StableDiffusion3Pipeline"].models
    assert learner.adapter == 4 * rollout.adapter
    # Rank 16 on q, k, v and out of both layers in each of two encoders, float32.
    assert rollout.adapter == 2 * 2 * 4 * 16 * (16 + 16) * 4
    fixed = sum(rollout.weights.values())
    assert rollout.total == fixed + rollout.adapter + max(rollout.activations.values())
    assert learner.total == fixed + learner.adapter + sum(learner.activations.values())


def test_gradient_checkpointing_lowers_the_learners_memory() -> None:
    _, plain, checkpointed = _measured().values()
    assert checkpointed.total < plain.total
    graph = "denoiser's graph"
    assert checkpointed.activations[graph] < plain.activations[graph] / 2


def test_parked_encoders_leave_but_come_for_a_visit() -> None:
    own = _measured()["rollout"].weights["text_encoder_3"]
    before, after = _measured(), _measured(park_encoders=True)
    for role, found in after.items():
        assert found.weights.keys() == before[role].weights.keys() - {"text_encoder_3"}
    encoding = (roles["rollout"].activations["encoding"] for roles in (after, before))
    assert next(encoding) - next(encoding) == own


def test_a_trained_t5_stays_and_keeps_a_graph() -> None:
    clips = _measured(park_encoders=True)["learner"]
    everything = _measured(
        park_encoders=True, train=("text_encoder", "text_encoder_2", "text_encoder_3")
    )["learner"]
    assert "text_encoder_3" in everything.weights
    graph = "encoders' graph"
    assert everything.activations[graph] > clips.activations[graph]


def test_a_trained_denoiser_alone_needs_no_graph_of_the_encoders() -> None:
    learner = _measured(train=("denoiser",))["learner"]
    assert learner.activations["encoders' graph"] == 0
    assert learner.activations["denoiser's graph"] > 0


def test_guidance_doubles_the_pass() -> None:
    one, two = (_measured(**how)["learner"].activations for how in ({"guidance": 1.0}, {}))
    graph = "denoiser's graph"
    assert two[graph] == pytest.approx(2 * one[graph], rel=0.05)


def test_t5_keeps_some_weights_in_float32_in_float16() -> None:
    half, brain = (_measured(**how)["rollout"].weights for how in ({"dtype": "float16"}, {}))
    assert half["text_encoder_3"] - brain["text_encoder_3"] == 64 * 32 * 2
    assert half["transformer"] == brain["transformer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sd9"], r"--model: 'sd9' is neither .* sd3\.5-medium"),
        (["--model", "sd1.5", "--train", "unet"], r"--train: .* no 'unet'; it has text_encoder"),
        (["--model", "sd1.5", "--batch-size", "0"], r"--batch-size: 0 should be at least 1"),
        (["--model", "sd1.5", "--height", "512"], r"--height, --width: 512 and none; give both"),
        (["--model", "flux.1-schnell", "--guidance", "3"], r"--guidance: 3, but .* set it to 1"),
        (["--model", "sd1.5", "--max-sequence-length", "9"], r"--max-sequence-length: 9, .* out"),
        ([], r"RUN_DIR, --model: neither was given"),
        (["run", "--model", "sd1.5"], r"RUN_DIR, --model: both were given"),
    ],
)
def test_wrong_options_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(arguments) == 1
    assert re.search(message, capsys.readouterr().err)


def test_the_command_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_: list(_measured().values()))
    assert main(["--model", "sd3.5-medium", "--park-encoders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| GiB | rollout | learner | learner, gradient checkpointing |"
    assert lines[2].startswith("| text_encoder | 0.00 |")
    assert any("Not included: reward actors" in line for line in lines)


def test_the_command_prints_json_of_a_directory(capsys: pytest.CaptureFixture) -> None:
    assert main(["--model", "embedded", "--microbatch-size", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rollout, *_ = found["bytes"]
    assert found["model"] == "embedded"
    assert list(rollout["weights"]) == ["text_encoder", "unet", "vae"]
    fixed = sum(rollout["weights"].values()) + rollout["adapter"]
    assert rollout["total"] == fixed + max(rollout["activations"].values())


@pytest.mark.parametrize(("microbatch_size", "fits"), [(4, True), (16, False)])
def test_the_papers_settings_fit_a_card_of_24_gb(microbatch_size: int, fits: bool) -> None:
    """What configs/paper/README.md says: rollout, learner and reward share a GPU."""
    config = load_config(
        "configs/paper/table2-sd15.yaml", [f"learner.microbatch_size={microbatch_size}"]
    )
    samples = config.samples_per_iteration // config.update.minibatches
    load = Workload(
        dtype=config.model.dtype,
        train=("text_encoder",),
        rank=16,
        batch_size=config.rollout.batch_size,
        microbatch_size=config.learner.microbatch_size,
        prompts=samples,  # of a minibatch, at most
        guidance=config.diffusion.guidance_scale,
    )
    rollout, learner, _ = measure(PUBLISHED["sd1.5"], load)
    gib = (rollout.total + learner.total) / 2**30
    assert gib == pytest.approx(14.0 if fits else 31.1, abs=0.1)
    contexts, reward, fragments = 3 * 0.5, 2.0, 1.1  # ImageReward: 1.8 GB of weights in float32
    assert (gib * fragments + contexts + reward <= 24e9 / 2**30) == fits
