"""The update is the paper's update: exact gradients, exact state, nothing else touched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from texforce_ray.config import Config
from texforce_ray.config_io import make_config
from texforce_ray.diffusion import ddim
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.errors import ConfigError, NumericsError
from texforce_ray.model.backbone import Backbone, load_backbone
from texforce_ray.rl import ppo
from texforce_ray.rl.learner import Learner, _mean_metrics, _Totals
from texforce_ray.rl.likelihood import Pairs
from texforce_ray.rl.trainer import UpdateBatch, learning_rate_factor

Load = Callable[[], Backbone]
Randomize = Callable[..., None]

PROMPTS = ["a green circle", "two red squares", "a green circle", "a blue square"]
SEEDS = np.array([3, 1, 4, 2**61])
ADVANTAGES = np.array([1.0, -0.5, 0.7, -2.0])
EVERYONE = np.ones(4, dtype=bool)
STEPS = 4
CPU = torch.device("cpu")


def _config(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "iterations": 2,
        "lora": {"rank": 2, "alpha": 2.0, "target_modules": ["q_proj", "v_proj"]},
        "diffusion": {"steps": STEPS, "guidance_scale": 3.0},
        "prompts": {"per_iteration": 4, "samples_per_prompt": 1},
        "rollout": {"batch_size": 4},
        "ppo": {"num_minibatches": 1, "clip_range": 1e-4, "timestep_fraction": 0.75},
        "learner": {"microbatch_size": 5},
    }
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return make_config(values)


def _sample(learner: Learner) -> Trajectory:
    d = learner.config.diffusion
    sampler = Sampler(learner.backbone, steps=d.steps, eta=d.eta, guidance_scale=d.guidance_scale)
    return sampler.sample(PROMPTS, SEEDS, learner.version)[0]


def _batch(trajectory: Trajectory, mask: np.ndarray = EVERYONE) -> UpdateBatch:
    return UpdateBatch(trajectory, np.where(mask, ADVANTAGES, 0.0), mask)


def _weights(learner: Learner) -> dict[str, np.ndarray]:
    return learner.snapshot().adapters["text_encoder"]


def _assert_equal_weights(one: Learner, other: Learner) -> None:
    for key, value in _weights(one).items():
        np.testing.assert_array_equal(value, _weights(other)[key], err_msg=key)


def _to_double(learner: Learner) -> Learner:
    for module in (learner.backbone.text_encoder, learner.backbone.unet, learner.backbone.vae):
        module.double()
    learner.ema = [tensor.double() for tensor in learner.ema]
    return learner


@pytest.fixture
def trained(
    double: None, tiny_backbone: Load, randomize: Randomize
) -> Callable[..., tuple[Learner, UpdateBatch]]:
    """A float64 learner some way from the policy that sampled its batch."""

    def make(**sections: Any) -> tuple[Learner, UpdateBatch]:
        learner = _to_double(Learner(tiny_backbone(), _config(**sections)))
        randomize(learner.adapter, seed=1)
        trajectory = _sample(learner)
        for parameter, base in zip(
            learner.parameters, [p.detach().clone() for p in learner.parameters], strict=True
        ):
            parameter.data = base * 1.05
        return learner, _batch(trajectory)

    return make


def _anchor(batch: UpdateBatch) -> tuple[Tensor, Tensor]:
    anchor = torch.from_numpy(batch.trajectory.log_probs)
    return anchor, torch.ones_like(anchor)


def _gradient(learner: Learner, batch: UpdateBatch, steps: np.ndarray) -> list[Tensor]:
    """What the learner hands to the optimizer for the whole batch, before clipping its norm."""
    captured: list[Tensor] = []
    clip = nn.utils.clip_grad_norm_

    def capture(parameters: list[nn.Parameter], limit: float) -> Tensor:
        captured.extend(p.grad.clone() for p in parameters)
        return clip(parameters, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", capture)
        totals = [_Totals(CPU) for _ in range(learner.config.learner.gradient_shards)]
        rows = np.arange(len(PROMPTS))
        gradient = learner._minibatch_gradient(batch, rows, steps, *_anchor(batch), totals)
        learner._apply(gradient)
    return captured


def _plain_autograd(learner: Learner, batch: UpdateBatch, steps: np.ndarray) -> list[Tensor]:
    """The same loss with every sample and step in one graph from tokens to log-probability."""
    backbone, table, g = learner.backbone, learner.table, learner.config.diffusion.guidance_scale
    trajectory = batch.trajectory
    losses = []
    for row in np.flatnonzero(batch.mask):
        prompt = backbone.tokenize([trajectory.prompts[row]]).ids
        for index in steps[row]:
            x = torch.from_numpy(trajectory.latents[[row], index]).double()
            x_prev = torch.from_numpy(trajectory.latents[[row], index + 1]).double()
            step = torch.tensor([index])
            output = backbone.predict(x, table.timesteps[step], backbone.encode(prompt))
            if g > 1:
                empty = backbone.encode(backbone.tokenize([""]).ids)
                base = backbone.predict(x, table.timesteps[step], empty)
                output = base + g * (output - base)
            mean = ddim.step_mean(table, step, x, output)
            ratio = (
                ddim.log_prob(table, step, x_prev, mean) - float(trajectory.log_probs[row, index])
            ).exp()
            clip, advantage = learner.config.ppo.clip_range, batch.advantages[row]
            losses.append(
                -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            )
    return list(torch.autograd.grad(torch.cat(losses).mean(), learner.parameters))


ALL_STEPS = np.tile(np.arange(STEPS), (4, 1))
SOME_STEPS = np.array([[0, 2], [1, 3], [2, 3], [0, 1]])


def _assert_close(ours: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    assert sum(float(t.square().sum()) for t in expected) > 0
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


# ---- gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_is_that_of_plain_autograd(
    trained: Callable, guidance_scale: float, masked: bool
) -> None:
    learner, batch = trained(diffusion={"guidance_scale": guidance_scale})
    if masked:
        batch = _batch(batch.trajectory, np.array([True, False, True, True]))
    expected = _plain_autograd(learner, batch, SOME_STEPS)
    _assert_close(_gradient(learner, batch, SOME_STEPS), expected, 1e-6)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("text_encoder", [True, False], ids=["joint", "unet"])
def test_gradient_with_a_unet_adapter_is_that_of_plain_autograd(
    trained: Callable, guidance_scale: float, text_encoder: bool
) -> None:
    lora = {"text_encoder": text_encoder, "unet": {"rank": 2, "target_modules": ["to_q", "to_v"]}}
    learner, batch = trained(lora=lora, diffusion={"guidance_scale": guidance_scale})
    expected = _plain_autograd(learner, batch, SOME_STEPS)
    _assert_close(_gradient(learner, batch, SOME_STEPS), expected, 1e-6)


def test_joint_training_keeps_a_rate_for_each_part_and_goes_on_from_its_state(
    tiny_backbone: Load,
) -> None:
    config = _config(lora={"unet": {"rank": 2, "lr": 1e-5}}, ppo={"kl_weight": 0.01})
    one, other = Learner(tiny_backbone(), config), Learner(tiny_backbone(), config)
    batch = _batch(_sample(one))
    assert one.update(batch)["ppo/ratio_error_first_pass"] < 1e-5
    rates = [group["lr"] for group in one.optimizer.param_groups]
    assert rates[1] / rates[0] == pytest.approx(1e-5 / config.optimizer.lr)
    other.load(one.state())
    again = _batch(_sample(one))
    one.update(again)
    other.update(again)
    for part in ("text_encoder", "unet"):
        ours = one.snapshot().adapters[part]
        for key, value in other.snapshot().adapters[part].items():
            np.testing.assert_array_equal(ours[key], value, err_msg=key)
        assert any(v.any() for k, v in ours.items() if "lora_B" in k)


def test_that_comparison_has_pairs_with_and_without_gradient(trained: Callable) -> None:
    learner, batch = trained()
    pairs = Pairs.of(np.arange(4), SOME_STEPS)
    stored = _anchor(batch)[0][pairs.sample, pairs.step]
    ratio = (learner.likelihood.log_probs(batch.trajectory, pairs) - stored).exp()
    beyond = (ratio - 1) * torch.from_numpy(ADVANTAGES[pairs.sample]).sign()
    ended = beyond > learner.config.ppo.clip_range
    assert 0 < int(ended.sum()) < len(ended)


@pytest.mark.parametrize("learner_section", [{"microbatch_size": 1}, {"microbatch_size": 64}])
def test_microbatches_do_not_change_the_gradient(
    trained: Callable, learner_section: dict[str, int]
) -> None:
    expected = _gradient(*trained(learner={"microbatch_size": 5}), ALL_STEPS)
    ours = _gradient(*trained(learner=learner_section), ALL_STEPS)
    _assert_close(ours, expected, 1e-9)


@pytest.mark.parametrize("shards", [2, 4])
def test_gradient_shards_do_not_change_the_gradient(trained: Callable, shards: int) -> None:
    mask = np.array([True, True, False, True])

    def gradient(count: int) -> list[Tensor]:
        learner, batch = trained(learner={"gradient_shards": count})
        return _gradient(learner, _batch(batch.trajectory, mask), ALL_STEPS)

    _assert_close(gradient(shards), gradient(1), 1e-9)


def test_decoupled_weights_reach_the_gradient(trained: Callable) -> None:
    learner, batch = trained(ppo={"decoupled": "always", "behaviour_cap": 1.001})
    steps = ALL_STEPS
    anchor, weight, error = learner._proximal(batch, steps, _anchor(batch)[0])
    assert error > 1e-4
    pairs = Pairs.of(np.arange(4), steps)
    current = learner.likelihood.log_probs(batch.trajectory, pairs).reshape(4, STEPS)
    torch.testing.assert_close(anchor, current, rtol=1e-12, atol=0)
    expected = (current - _anchor(batch)[0]).exp().clamp(max=1.001)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)
    assert (weight == 1.001).any()
    assert (weight < 1.001).any()
    # At the proximal policy the ratio is 1: the gradient is that of -w A log pi.
    ours = learner._shard_gradient(batch, pairs, anchor, weight, len(pairs), _Totals(CPU))
    scaled = replace(batch, advantages=np.ones(4))
    by_weight = torch.from_numpy(ADVANTAGES)[:, None] * weight
    expected = learner._shard_gradient(scaled, pairs, anchor, by_weight, len(pairs), _Totals(CPU))
    _assert_close(ours, expected, 1e-9)


# ---- likelihoods -------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_learner_and_sampler_agree_in_float32(
    tiny_backbone: Load, randomize: Randomize, guidance_scale: float
) -> None:
    learner = Learner(tiny_backbone(), _config(diffusion={"guidance_scale": guidance_scale}))
    randomize(learner.adapter, seed=1)
    metrics = learner.update(_batch(_sample(learner)))
    assert 0 <= metrics["ppo/ratio_error_first_pass"] <= 1e-5
    assert metrics["ppo/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["ppo/trained_pairs"] == 4 * 3


def test_stale_samples_are_checked_against_the_policy_that_drew_them(
    tiny_backbone: Load, randomize: Randomize
) -> None:
    learner = Learner(tiny_backbone(), _config(ppo={"decoupled": "always"}))
    randomize(learner.adapter, seed=1)
    behaviour, batch = learner.snapshot(), _batch(_sample(learner))
    randomize(learner.adapter, seed=2)
    current = _weights(learner)
    with pytest.raises(NumericsError, match=r"iteration 0, allowed is 1e-04.*max_ratio_error"):
        learner.update(batch)
    assert learner.version == learner.updates == 0
    metrics = learner.update(batch, behaviour)
    assert metrics["ppo/ratio_error_first_pass"] <= 1e-5
    largest = 1.01 * learner.config.optimizer.lr
    for key, value in _weights(learner).items():
        assert 0 < np.abs(value - current[key]).max() < largest, key


# ---- state -------------------------------------------------------------------------------


def test_restored_learner_goes_on_with_the_same_bits(
    tiny_backbone: Load, randomize: Randomize
) -> None:
    config = _config(optimizer={"ema_decay": 0.9}, ppo={"num_minibatches": 2, "epochs": 2})
    whole = Learner(tiny_backbone(), config)
    randomize(whole.adapter, seed=1)
    whole.update(_batch(_sample(whole)))
    state = whole.state()
    batch = _batch(_sample(whole))
    whole.update(batch)
    restored = Learner(tiny_backbone(), config)
    restored.load(state)
    np.testing.assert_array_equal(_sample(restored).latents, batch.trajectory.latents)
    restored.update(batch)
    assert (restored.version, restored.updates) == (whole.version, whole.updates) == (2, 8)
    _assert_equal_weights(whole, restored)
    for key, value in whole.state().optimizer.items():
        np.testing.assert_array_equal(value, restored.state().optimizer[key], err_msg=key)
    averaged = whole.evaluation_snapshot().adapters["text_encoder"]
    for key, value in restored.evaluation_snapshot().adapters["text_encoder"].items():
        np.testing.assert_array_equal(value, averaged[key], err_msg=key)


def test_state_is_a_copy(tiny_backbone: Load) -> None:
    learner = Learner(tiny_backbone(), _config(optimizer={"ema_decay": 0.9}))
    learner.update(_batch(_sample(learner)))
    state = learner.state()
    before = {k: v.copy() for k, v in {**state.optimizer, **state.ema["parameters"]}.items()}
    learner.update(_batch(_sample(learner)))
    for key, value in {**state.optimizer, **state.ema["parameters"]}.items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


def test_reloading_the_start_undoes_an_update(tiny_backbone: Load) -> None:
    learner = Learner(tiny_backbone(), _config())
    state, batch = learner.state(), _batch(_sample(learner))
    learner.update(batch)
    once = _weights(learner)
    learner.load(state)
    learner.update(batch)
    for key, value in _weights(learner).items():
        np.testing.assert_array_equal(value, once[key], err_msg=key)


# ---- what has influence, and on what ------------------------------------------------------


def test_masked_sample_has_no_influence(tiny_backbone: Load) -> None:
    mask = np.array([True, True, False, True])
    config = _config(ppo={"max_ratio_error": 1e9, "num_minibatches": 1})

    def updated(noise: float) -> Learner:
        learner = Learner(tiny_backbone(), config)
        trajectory = _sample(learner)
        latents = trajectory.latents.copy()
        latents[2] += noise
        advantages = ADVANTAGES + np.where(mask, 0, 10 * noise)
        learner.update(UpdateBatch(replace(trajectory, latents=latents), advantages, mask))
        return learner

    _assert_equal_weights(updated(0.0), updated(0.5))


def test_wholly_masked_minibatch_is_survived(tiny_backbone: Load) -> None:
    learner = Learner(tiny_backbone(), _config())
    metrics = learner.update(_batch(_sample(learner), np.zeros(4, dtype=bool)))
    assert metrics["ppo/trained_pairs"] == 0
    assert metrics["learner/grad_norm"] == 0
    assert all(np.isfinite(value).all() for value in _weights(learner).values())


def test_frozen_parts_stay_frozen(tiny_backbone: Load) -> None:
    learner = Learner(tiny_backbone(), _config())
    before, adapter = _frozen_digest(learner.backbone), _weights(learner)
    learner.update(_batch(_sample(learner)))
    assert _frozen_digest(learner.backbone) == before
    assert all((_weights(learner)[key] != value).any() for key, value in _lora_b(adapter))


def _lora_b(weights: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    return [(key, value) for key, value in weights.items() if "lora_B" in key]


def _frozen_digest(backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for module in (backbone.unet, backbone.vae, backbone.text_encoder):
        for name, tensor in module.state_dict().items():
            if "lora_" not in name:
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_kl_is_zero_at_the_base_and_pulls_towards_it(
    tiny_backbone: Load, randomize: Randomize
) -> None:
    config = _config(ppo={"kl_weight": 1.0, "timestep_fraction": 1.0, "num_minibatches": 4})
    learner = Learner(tiny_backbone(), config)
    steps = np.tile(np.arange(STEPS), (4, 1))
    indifferent = UpdateBatch(_sample(learner), np.zeros(4), EVERYONE)
    assert all(float(g.abs().max()) == 0 for g in _gradient(learner, indifferent, steps))
    randomize(learner.adapter, seed=1)
    batch = UpdateBatch(_sample(learner), np.zeros(4), EVERYONE)
    first = learner.update(batch)["ppo/kl_base"]
    again = replace(batch, trajectory=_sample(learner))
    assert 0 < learner.update(again)["ppo/kl_base"] < first


def test_kl_equals_the_divergence_of_the_two_policies(trained: Callable) -> None:
    learner, batch = trained(ppo={"kl_weight": 0.5, "clip_range": 0.9})
    pairs, totals = Pairs.of(np.arange(4), ALL_STEPS), _Totals(CPU)
    learner._shard_gradient(batch, pairs, *_anchor(batch), len(pairs), totals)

    def means() -> Tensor:
        conditioning, prompt = learner.likelihood.encode(batch.trajectory, np.arange(4))
        prepared = learner.backbone.prepare(conditioning)
        return learner.likelihood.mean(batch.trajectory, pairs, prepared, prompt[pairs.sample])[0]

    with torch.no_grad():
        tuned = means()
        with learner.adapter.disabled():
            base = means()
    sigma = learner.table.sigma[torch.from_numpy(pairs.step)].double()[:, None, None, None]
    expected = ((tuned - base) ** 2 / (2 * sigma**2)).mean(dim=(1, 2, 3)).sum()
    assert totals.row()[-1] == pytest.approx(float(expected), rel=1e-9)


def test_average_follows_the_adapter_and_is_what_is_evaluated(tiny_backbone: Load) -> None:
    learner = Learner(tiny_backbone(), _config(optimizer={"ema_decay": 0.75}))
    start = _weights(learner)
    learner.update(_batch(_sample(learner)))
    now, averaged = learner.snapshot(), learner.evaluation_snapshot()
    assert averaged.version == now.version == 1
    for key, value in averaged.adapters["text_encoder"].items():
        live = now.adapters["text_encoder"][key]
        np.testing.assert_allclose(value, 0.75 * start[key] + 0.25 * live, rtol=1e-5, atol=1e-9)
        np.testing.assert_array_equal(live, _weights(learner)[key])
    assert any(
        (value != now.adapters["text_encoder"][key]).any()
        for key, value in averaged.adapters["text_encoder"].items()
    )


def test_without_average_the_current_policy_is_evaluated(tiny_backbone: Load) -> None:
    learner = Learner(tiny_backbone(), _config())
    learner.update(_batch(_sample(learner)))
    evaluated = learner.evaluation_snapshot().adapters["text_encoder"]
    for key, value in _weights(learner).items():
        np.testing.assert_array_equal(value, evaluated[key])


def test_update_makes_good_samples_likelier(tiny_backbone: Load) -> None:
    learner = Learner(tiny_backbone(), _config(ppo={"timestep_fraction": 1.0, "epochs": 3}))
    batch = _batch(_sample(learner))
    learner.update(batch)
    pairs = Pairs.of(np.arange(4), ALL_STEPS)
    gain = learner.likelihood.log_probs(batch.trajectory, pairs) - _anchor(batch)[0].reshape(-1)
    assert float((gain * torch.from_numpy(ADVANTAGES[pairs.sample])).mean()) > 0


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    factors = [learning_rate_factor(i, 100, 0.1, "cosine") for i in range(101)]
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0, abs=1e-12)
    assert (np.diff(factors[10:]) < 0).all()
    assert {learning_rate_factor(i, 100, 0.0, "constant") for i in range(101)} == {1.0}


def test_clipped_share_uses_the_configured_range(trained: Callable) -> None:
    learner, batch = trained(ppo={"clip_range": 0.9})
    pairs, totals = Pairs.of(np.arange(4), ALL_STEPS), _Totals(CPU)
    learner._shard_gradient(batch, pairs, *_anchor(batch), len(pairs), totals)
    current = learner.likelihood.log_probs(batch.trajectory, pairs)
    stored = _anchor(batch)[0][pairs.sample, pairs.step]
    expected = ppo.clipped_loss(current, stored, torch.zeros(len(pairs)), 0.9)
    metrics = _mean_metrics(np.array([totals.row()]))
    assert "ppo/kl_base" not in metrics
    assert metrics["ppo/clipfrac"] == pytest.approx(float(expected.clipped.mean()))
    assert metrics["ppo/approx_kl"] == pytest.approx(float(expected.approx_kl.mean()), rel=1e-6)


# ---- what changes nothing ----------------------------------------------------------------


def test_checkpointed_activations_give_the_same_gradient(trained: Callable) -> None:
    gradients = []
    for checkpointing in (False, True):
        learner, batch = trained(learner={"gradient_checkpointing": checkpointing})
        assert learner.backbone.unet.is_gradient_checkpointing is checkpointing
        gradients.append(_gradient(learner, batch, ALL_STEPS))
    _assert_close(*gradients, 0.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_networks_agree_with_themselves(tiny_pipeline: Path, dtype: str) -> None:
    config = _config(model={"dtype": dtype}, ppo={"clip_range": 1e-4})
    learner = Learner(load_backbone(str(tiny_pipeline), dtype=dtype), config)
    assert all(p.dtype == torch.float32 for p in learner.parameters)
    error = learner.update(_batch(_sample(learner)))["ppo/ratio_error_first_pass"]
    assert error <= 1e-5  # an order of magnitude inside the clip range


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_unet_agrees_with_itself(tiny_backbone: Load) -> None:
    backbone = tiny_backbone()
    backbone.unet.compile(dynamic=False)
    learner = Learner(backbone, _config(learner={"microbatch_size": 12}))
    for _ in range(2):
        metrics = learner.update(_batch(_sample(learner)))
        assert metrics["ppo/ratio_error_first_pass"] <= 1e-5


# ---- what goes wrong ---------------------------------------------------------------------


def _poisoned(learner: Learner, monkeypatch: pytest.MonkeyPatch, updates: set[int]) -> None:
    """The gradients of these updates are not finite."""
    clean = learner._minibatch_gradient

    def gradient(*given: Any) -> list[Tensor]:
        found = clean(*given)
        return [g * float("nan") for g in found] if learner.updates in updates else found

    monkeypatch.setattr(learner, "_minibatch_gradient", gradient)


def test_an_update_without_a_finite_gradient_is_left_out(
    tiny_backbone: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(tiny_backbone(), _config(ppo={"epochs": 3, "num_minibatches": 1}))
    _poisoned(learner, monkeypatch, {1, 2})
    metrics = learner.update(_batch(_sample(learner)))
    assert metrics["learner/skipped"] == 2
    assert np.isfinite(metrics["learner/grad_norm"])
    assert learner.updates == 3
    assert all(np.isfinite(value).all() for value in _weights(learner).values())
    # Those in a row are counted over iterations and resumes.
    assert learner.state().skipped == 2
    other = Learner(tiny_backbone(), _config())
    other.load(learner.state())
    assert other.skipped == 2


def test_too_many_in_a_row_stop_the_run_and_name_the_samples(
    tiny_backbone: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(tiny_backbone(), _config(ppo={"epochs": 4, "max_skipped": 1}))
    _poisoned(learner, monkeypatch, {1, 2, 3})
    with pytest.raises(NumericsError, match=r"samples/iteration-00000\.parquet"):
        learner.update(_batch(_sample(learner)))


def test_updates_end_early_beyond_the_target_kl(tiny_backbone: Load) -> None:
    batch = _batch(_sample(Learner(tiny_backbone(), _config())))
    done = {}
    for target in (None, 1e-12):
        config = _config(ppo={"epochs": 4, "target_kl": target}, optimizer={"lr": 0.05})
        learner = Learner(tiny_backbone(), config)
        metrics = learner.update(batch)
        done[target] = learner.updates
    assert done == {None: 4, 1e-12: 1}  # at first there is no KL to speak of
    assert metrics["ppo/updates_left_out"] == 3


def test_a_target_kl_goes_on_after_a_batch_that_is_not_finite() -> None:
    totals = _Totals(CPU)

    def result(kl: float) -> ppo.PpoLoss:
        ones = torch.ones(2)
        return ppo.PpoLoss(ones, ones, ones * kl, ones)

    totals.add(result(float("nan")), None)
    assert np.isnan(totals.take_kl()[1])
    totals.add(result(5.0), None)
    assert totals.take_kl() == [2.0, 10.0]
    assert totals.take_kl() == [0.0, 0.0]


# ---- steps without likelihood, samples that are left out -----------------------------------


@pytest.mark.parametrize(
    "schedule",
    [{"set_alpha_to_one": True}, {"steps_offset": 0}, {"timestep_spacing": "linspace"}],
    ids=lambda schedule: next(iter(schedule)),
)
@pytest.mark.parametrize("numbers", ["always", "float16"])
def test_steps_without_noise_enter_no_ratio(
    tiny_backbone: Load, schedule: dict[str, Any], numbers: str
) -> None:
    """A pipeline that was saved with Euler or DPM has DDIM's default, `set_alpha_to_one`."""
    backbone = tiny_backbone()
    backbone.scheduler = DDIMScheduler.from_config(backbone.scheduler.config, **schedule)
    sections: dict[str, Any] = {"ppo": {"decoupled": "always", "timestep_fraction": 1.0}}
    if numbers == "float16":
        sections = {"ppo": {"timestep_fraction": 1.0}, "diffusion": {"storage_dtype": "float16"}}
    learner = Learner(backbone, _config(**sections))
    metrics = learner.update(_batch(_sample(learner)))
    assert metrics["ppo/ratio_error_first_pass"] < 1e-4
    assert np.isfinite(metrics["ppo/loss"])


def test_a_model_whose_only_step_has_no_noise_is_refused(tiny_backbone: Load) -> None:
    backbone = tiny_backbone()
    backbone.scheduler = DDIMScheduler.from_config(backbone.scheduler.config, set_alpha_to_one=True)
    with pytest.raises(ConfigError, match=r"diffusion\.steps: 1 steps"):
        Learner(backbone, _config(diffusion={"steps": 1}))


@pytest.mark.parametrize("stale", [False, True])
def test_a_masked_sample_of_nan_enters_no_number(tiny_backbone: Load, stale: bool) -> None:
    learner = Learner(tiny_backbone(), _config(ppo={"decoupled": "always"}))
    trajectory = _sample(learner)
    trajectory.latents[2, 1:], trajectory.log_probs[2] = np.nan, np.nan
    mask = np.array([True, True, False, True])
    behaviour = learner.snapshot() if stale else None
    metrics = learner.update(_batch(trajectory, mask), behaviour)
    assert metrics["ppo/ratio_error_first_pass"] < 1e-5
    assert metrics["learner/skipped"] == 0
    assert all(np.isfinite(value).all() for value in _weights(learner).values())


def test_a_minibatch_that_is_all_masked_is_no_optimizer_step(tiny_backbone: Load) -> None:
    learner = Learner(tiny_backbone(), _config(ppo={"num_minibatches": 2}))
    mask = np.zeros(4, dtype=bool)
    mask[learner._minibatches(_batch(_sample(learner)), 0)[0]] = True
    learner.update(_batch(_sample(learner), mask))
    steps = {k: v for k, v in learner.state().optimizer.items() if k.endswith("/step")}
    assert {float(step) for step in steps.values()} == {1.0}
    assert learner.updates == 2  # the schedule goes on


def test_a_target_kl_hides_no_gradient_that_is_not_finite(tiny_backbone: Load) -> None:
    learner = Learner(tiny_backbone(), _config(ppo={"target_kl": 0.1, "max_skipped": 0}))
    trajectory = _sample(learner)
    trajectory.latents[1] = np.nan
    with pytest.raises(NumericsError, match=r"ratio - 1\| = nan|norm nan"):
        learner.update(_batch(trajectory))
    learner = Learner(
        tiny_backbone(),
        _config(ppo={"target_kl": 0.1, "max_skipped": 0, "max_ratio_error": float("inf")}),
    )
    batch = replace(_batch(_sample(learner)), advantages=np.array([np.nan, 1.0, 1.0, 1.0]))
    with pytest.raises(NumericsError, match="norm nan"):
        learner.update(batch)
