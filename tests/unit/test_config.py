"""A wrong configuration fails before anything starts, and says what would be right."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from texforce_ray.config import Config
from texforce_ray.config.fields import walk
from texforce_ray.config.help import describe
from texforce_ray.config.io import load_config, make_config
from texforce_ray.errors import ConfigError


def _problem(values: dict[str, Any] | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides, base=values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("objective.clip_rang=1", "objective.clip_range"),
        ("prompts.per_iteraton=3", "prompts.per_iteration"),
        ("prompts.train.colum=x", "prompts.train.column"),
        ("eval.prompts.colum=x", "eval.prompts.column"),
        ("guidance_scale=3", "diffusion.guidance_scale"),
        ("lora.text_encoder.rnak=3", "lora.text_encoder.rank"),
        ("lora.rnak=3", "lora.text_encoder.rank"),
    ],
)
def test_unknown_key_is_named_with_the_likely_one(override: str, meant: str) -> None:
    key = override.partition("=")[0]
    assert f"{key}: unknown key; did you mean {meant}?" in _problem(None, override)


@pytest.mark.parametrize(
    ("override", "now"),
    [
        ("ppo.clip_range=1e-3", "ppo.clip_range: is now objective.clip_range"),
        ("ppo.num_minibatches=2", "ppo.num_minibatches: is now update.minibatches"),
        ("direct.steps=2", "direct.steps: is now objective.steps"),
        ("direct={}", "direct: is now objective (with kind: direct)"),
        ("lora.rank=8", "lora.rank: is now lora.text_encoder.rank"),
        ("lora.unet.rank=8", "lora.unet: is now lora.denoiser"),
        ("lora.text_encoder=false", "lora.text_encoder: no longer takes true or false"),
    ],
)
def test_a_key_of_an_earlier_version_is_reported_with_its_new_name(override: str, now: str) -> None:
    assert now in _problem(None, override)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective={kind: direct, method: draft}"],
        ["objective.method=draft", "objective.kind=direct"],
        ["objective.kind=direct", "objective.method=draft"],
    ],
)
def test_another_objective_takes_the_place_of_the_files(overrides: list[str]) -> None:
    rewards = "rewards=[{name: shapes_scorer}]"
    config = load_config("configs/shapes.yaml", [*overrides, rewards])
    assert config.direct is not None
    assert config.direct.method == "draft"
    same = load_config("configs/shapes.yaml", ["objective.kind=ppo"])
    assert same == load_config("configs/shapes.yaml")


def test_a_key_of_another_objective_is_rejected() -> None:
    values = {"objective": {"kind": "direct", "clip_range": 0.1}}
    assert "objective.clip_range: not a key of objective kind 'direct'" in _problem(values)


def test_help_marks_the_keys_that_may_differ_on_resume() -> None:
    lines = describe().splitlines()
    assert '  run_dir = "runs/{time}" [free]' in lines
    assert "  optimizer.lr = 0.0003 [recorded]" in lines
    assert '  track.wandb.project = "texforce" [free]' in lines  # free as a whole section
    assert "  seed = 0" in lines


def test_unknown_key_of_a_reward_is_named_with_its_place() -> None:
    rewards = [{"name": "shapes"}, {"name": "jpeg_compressibility", "weigth": 2}]
    problem = _problem({"rewards": rewards})
    assert "rewards.1.weigth: unknown key; did you mean rewards.1.weight?" in problem
    assert len(problem.splitlines()) == 2


def test_every_wrong_key_is_reported_at_once() -> None:
    problem = _problem(
        {"update": {"epochs": 0}, "lora": {"text_encoder": {"rank": "big"}}, "sede": 1}
    )
    for part in (
        "update.epochs",
        "got 0",
        "lora.text_encoder.rank",
        "got 'big'",
        "sede: unknown key",
    ):
        assert part in problem


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("seed=x", "seed: Input should be a valid integer"),
        ("seed=x", "(got 'x')"),
        ("diffusion.eta=-1", "diffusion.eta: Input should be greater than or equal to 0 (got -1)"),
        ("model.dtype=fp16", "'float32', 'float16' or 'bfloat16' (got 'fp16')"),
        ("advantage.mode=dr", "'prompt', 'group' or 'batch'"),
        ("max_staleness=2", "max_staleness: Input should be less than or equal to 1 (got 2)"),
        ("update=1", "update: Input should be a valid dictionary"),
        ("rewards=[]", "rewards: "),
        ("optimizer.lr=.nan", "optimizer.lr: Input should be a finite number (got nan)"),
        ("seed=0x_", "seed=0x_"),
        ("seed=[", "seed=["),
        (f"rewards={'[' * 5000}", "maximum recursion depth"),
        ("[=1", "[=1"),
        ("seed=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
        ("seed", "override 'seed' should look like key.sub=value"),
        ("--seed=1", "override '--seed=1' should look like key.sub=value"),
    ],
)
def test_wrong_value_names_key_and_value(override: str, shown: str) -> None:
    assert shown in _problem(None, override)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["rollout.batch_size=7"], ["rollout.batch_size: 7 does not divide", "16 x 8 = 128"]),
        (["rollout.batch_size=7"], ["possible: 1, 2, 4, 8, 16, 32, 64, 128"]),
        (["update.minibatches=3"], ["update.minibatches: 3", "possible: 1, 2, 4"]),
        (
            ["learner.gradient_shards=3"],
            [
                "learner.gradient_shards: 3",
                "minibatch of 32 samples",
                "possible: 1, 2, 4, 8, 16, 32",
            ],
        ),
        (
            ["advantage.mode=group", "prompts.samples_per_prompt=1", "rollout.batch_size=16"],
            ["prompts.samples_per_prompt: 1", "'group'"],
        ),
        (["diffusion.eta=0"], ["diffusion.eta: 0", "PPO has no likelihood", "nft, awm"]),
        (
            ["objective.kind=direct", "learner.gradient_checkpointing=auto"],
            ["learner.gradient_checkpointing: auto", "set objective.gradient_checkpointing"],
        ),
        (
            ["rollout.dtype=bfloat16"],
            ["rollout.dtype: bfloat16 with model.dtype float32", "'ppo' may compute", "nft, awm"],
        ),
        (
            ["rollout.dtype=bfloat16", "objective.kind=nft", "learner.colocated=true"],
            ["rollout.dtype: bfloat16 with learner.colocated", "one set of weights"],
        ),
        (
            [
                "objective.kind=nft", "objective.embedding_anchor_weight=0.1",
                "lora.text_encoder=null", "lora.denoiser={}",
            ],
            ["objective.embedding_anchor_weight: 0.1", "no text encoder is trained"],
        ),
        (
            ["objective.kind=raft", "objective.best=8"],
            ["objective.best: 8 of prompts.samples_per_prompt = 8", "at most 7"],
        ),
        (
            [
                "objective.kind=raft", "objective.best=16", "prompts.samples_per_prompt=1",
                "advantage.mode=batch", "rollout.batch_size=16",
            ],
            ["objective.best: 16 of the iteration's 16 samples", "at most 15"],
        ),
        (
            ["objective.trust=kl_mask", "objective.decoupled=never", "model.dtype=float16"],
            ["objective.trust: 'kl_mask' compares means", "objective.decoupled to 'auto'"],
        ),
    ],
)  # fmt: skip
def test_impossible_arithmetic_lists_what_is_possible(
    overrides: list[str], parts: list[str]
) -> None:
    problem = _problem(None, *overrides)
    for part in parts:
        assert part in problem


@pytest.mark.parametrize(
    ("rewards", "part"),
    [
        ([{}], "exactly one of 'name'"),
        ([{"name": "shapes", "target": "a:B"}], "exactly one of 'name'"),
        ([{"target": "a.b.C"}], "'package.module:Class'"),
        ([{"name": "shapes"}, {"name": "shapes"}], "['shapes'] named twice"),
        (
            [{"name": "shapes", "weight": float("nan")}],
            "rewards.0.weight: Input should be a finite number (got nan)",
        ),
    ],
)
def test_rewards_that_cannot_be_are_refused(rewards: list[dict], part: str) -> None:
    assert part in _problem({"rewards": rewards})


def test_prompt_source_is_a_set_or_a_file() -> None:
    assert "exactly one of 'set'" in _problem(
        None, "prompts.train.path=x.txt", "prompts.train.set=s"
    )
    assert load_config(None, ["prompts.train.path=x.txt"]).prompts.train.set is None


def test_derived_numbers_follow_the_config() -> None:
    config = load_config(None, ["diffusion.steps=5", "objective.timestep_fraction=0.01"])
    assert config.samples_per_iteration == 128
    assert config.units_per_iteration == 4
    assert config.total_updates == 80
    assert config.trained_timesteps == 1
    assert not config.uses_decoupled
    assert config.ratio_error_bound == 1e-4
    for override in ("max_staleness=1", "model.dtype=bfloat16", "diffusion.storage_dtype=float16"):
        assert load_config(None, [override]).uses_decoupled
    assert not load_config(None, ["max_staleness=1", "objective.decoupled=never"]).uses_decoupled


_KEYS = st.one_of(
    st.sampled_from([key.plain for key in walk(Config)]),
    st.sampled_from(
        ["rewards.0", "rewards.0.name", "rewards.9.x", "rewards[0].name", "rewards.-1"]
    ),
    st.text(max_size=12),
)
_VALUES = st.one_of(
    st.text(max_size=12),
    st.text(alphabet="0xob_:.-+e[]{},'\"$&*!?<>|%@ \n", max_size=8),
    st.sampled_from(
        ["null", "true", "1", "-1", "0.5", ".inf", ".nan", "[]", "{}", "[1]", "{a: 1}"]
    ),
)


@pytest.mark.long
@given(st.lists(st.tuples(_KEYS, _VALUES), max_size=3), st.booleans())
def test_random_overrides_only_ever_raise_config_errors(
    pairs: list[tuple[str, str]], with_rewards: bool
) -> None:
    base = {"rewards": [{"name": "shapes"}]} if with_rewards else None
    # Any other error than ConfigError would reach the user as a traceback: it fails this test.
    with contextlib.suppress(ConfigError):
        config = load_config(None, [f"{key}={value}" for key, value in pairs], base)
        assert make_config(config.model_dump()) == config or "nan" in str(config)


def test_sampling_ahead_in_the_actor_that_learns_is_refused() -> None:
    load_config(None, ["learner.colocated=true"])
    with pytest.raises(ConfigError, match=r"max_staleness: 1 with learner\.colocated.*=0"):
        load_config(None, ["learner.colocated=true", "max_staleness=1"])
