"""A wrong configuration fails before anything starts, and says what would be right."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from texforce_ray.config import Config, field_paths
from texforce_ray.config_io import load_config, make_config, resolve_run_dir, to_yaml
from texforce_ray.errors import ConfigError, RunDirectoryError
from texforce_ray.records.run_directory import check_same

PRESETS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def _problem(values: dict[str, Any] | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides, base=values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("ppo.clip_rang=1", "ppo.clip_range"),
        ("prompts.per_iteraton=3", "prompts.per_iteration"),
        ("prompts.train.colum=x", "prompts.train.column"),
        ("eval.prompts.colum=x", "eval.prompts.column"),
        ("guidance_scale=3", "diffusion.guidance_scale"),
        ("lora.rnak=3", "lora.rank"),
    ],
)
def test_unknown_key_is_named_with_the_likely_one(override: str, meant: str) -> None:
    key = override.partition("=")[0]
    assert f"{key}: unknown key; did you mean {meant}?" in _problem(None, override)


def test_unknown_key_of_a_reward_is_named_with_its_place() -> None:
    rewards = [{"name": "shapes"}, {"name": "jpeg_compressibility", "weigth": 2}]
    problem = _problem({"rewards": rewards})
    assert "rewards.1.weigth: unknown key; did you mean rewards.1.weight?" in problem
    assert len(problem.splitlines()) == 2


def test_every_wrong_key_is_reported_at_once() -> None:
    problem = _problem({"ppo": {"epochs": 0}, "lora": {"rank": "big"}, "sede": 1})
    for part in ("ppo.epochs", "got 0", "lora.rank", "got 'big'", "sede: unknown key"):
        assert part in problem


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("seed=x", "seed: Input should be a valid integer"),
        ("seed=x", "(got 'x')"),
        ("diffusion.eta=0", "diffusion.eta: Input should be greater than 0 (got 0)"),
        ("model.dtype=fp16", "'float32', 'float16' or 'bfloat16' (got 'fp16')"),
        ("advantage.mode=dr", "'prompt', 'group' or 'batch'"),
        ("max_staleness=2", "max_staleness: Input should be less than or equal to 1 (got 2)"),
        ("ppo=1", "ppo: Input should be a valid dictionary"),
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
        (["ppo.num_minibatches=3"], ["ppo.num_minibatches: 3", "possible: 1, 2, 4"]),
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
    ],
)
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


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("seed: 3\nppo: {epochs: 2}\nrewards: [{name: shapes}, {target: 'm:C'}]\n")
    config = load_config(
        path, ["ppo.clip_range=0.2", "rewards.1.weight=-2", "rewards.1.kwargs.size=7", "seed=4"]
    )
    assert (config.seed, config.ppo.epochs, config.ppo.clip_range) == (4, 2, 0.2)
    assert [reward.key for reward in config.rewards] == ["shapes", "C"]
    assert (config.rewards[1].weight, config.rewards[1].kwargs) == (-2, {"size": 7})
    with pytest.raises(ConfigError, match=r"rewards\.2\.weight=1.*rewards has 2 entries"):
        load_config(path, ["rewards.2.weight=1"])
    with pytest.raises(ConfigError):
        load_config(path, ["rewards[1].weight=1"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "a: 1\n  b: 2\n", "\x00"])
def test_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(path)


def test_binary_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x80\x81")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load_config(path)


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "shapes.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"shape\.yaml does not exist.*holds shapes\.yaml"):
        load_config(tmp_path / "shape.yaml")


def test_empty_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_config(path) == Config()


def _unusual() -> Config:
    return make_config(
        {
            "seed": 2**40,
            "ppo": {"max_ratio_error": float("inf")},
            "optimizer": {"eps": 1e-12, "ema_decay": 0.999},
            "model": {"revision": "7e12345", "variant": "${fp16}"},
            "rollout": {"resources": {"rack: a": 0.5}},
            "prompts": {"train": {"path": "/tmp/ä, 'b': #c.txt", "column": "yes"}},
            "rewards": [
                {"name": "shapes", "label": "on"},
                {"target": "m:C", "kwargs": {"a": [1, {"b": None}], "off": "1e3", "n": "null"}},
            ],
        }
    )


@pytest.mark.parametrize("config", [Config(), _unusual()], ids=["default", "unusual"])
def test_written_config_reads_back_equal(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert load_config(path).placement_free() == config.placement_free()


@pytest.mark.parametrize("path", PRESETS or [None], ids=lambda path: path and path.stem)
def test_every_preset_is_valid(path: Path | None) -> None:
    if path is None:
        pytest.skip("configs/ is empty")
    assert make_config(load_config(path).model_dump()) == load_config(path)


def test_placement_may_change_on_resume_and_nothing_else() -> None:
    base = Config().placement_free()
    moved = [
        "run_dir=/elsewhere",
        "model.device=cuda",
        "rollout.num_workers=7",
        "rollout.num_gpus=0.5",
        "learner.num_cpus=3",
        "checkpoint.every=9",
        "ray.address=auto",
    ]
    rewards = {"rewards": [{"name": "shapes", "replicas": 4, "retries": 0, "timeout_s": 1}]}
    assert load_config(None, moved, base=rewards).placement_free() == base
    changed = [
        ("seed=1", None),
        ("iterations=21", None),
        ("rollout.batch_size=16", None),
        ("rollout.num_threads=1", None),
        ("learner.gradient_shards=2", None),
        ("eval.seed=5", None),
        ("model.dtype=float16", None),
        ("seed=0", {"rewards": [{"name": "shapes", "weight": 2}]}),
        ("seed=0", {"rewards": [{"name": "shapes", "kwargs": {"a": 1}}]}),
    ]
    for override, values in changed:
        assert load_config(None, [override], base=values).placement_free() != base, override


def test_only_what_the_learning_may_need_changes_on_resume(tmp_path: Path) -> None:
    before = Config()
    tuned = ["optimizer.lr=1e-5", "ppo.kl_weight=0.1", "iterations=30", "rewards.0.weight=2"]
    rewards = {"rewards": [{"name": "shapes"}]}
    changes = check_same(before, load_config(None, tuned, base=rewards), tmp_path)
    assert changes == {
        "iterations": (20, 30),
        "optimizer.lr": (3e-4, 1e-5),
        "ppo.kl_weight": (0.0, 0.1),
        "rewards.0.weight": (1.0, 2.0),
    }
    assert check_same(before, load_config(None, ["rollout.num_workers=3"]), tmp_path) == {}
    with pytest.raises(RunDirectoryError, match=r"seed: was 0, now 1") as caught:
        check_same(before, load_config(None, ["seed=1", "optimizer.lr=1e-5"]), tmp_path)
    assert "optimizer.lr: was" not in str(caught.value)


def test_relative_run_directory_is_refused_under_a_ray_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for run_dir in ("runs/{time}", "mine"):
        with pytest.raises(ConfigError, match=r"run_dir:.*relative.*absolute path"):
            resolve_run_dir(make_config({"run_dir": run_dir}))
    absolute = make_config({"run_dir": str(tmp_path / "{time}")})
    resolved = Path(resolve_run_dir(absolute).run_dir)
    assert resolved.parent == tmp_path
    assert resolved.name.replace("-", "").isdigit()
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    monkeypatch.chdir(tmp_path)
    assert resolve_run_dir(make_config({"run_dir": "mine"})).run_dir == str(tmp_path / "mine")


def test_derived_numbers_follow_the_config() -> None:
    config = load_config(None, ["diffusion.steps=5", "ppo.timestep_fraction=0.01"])
    assert config.samples_per_iteration == 128
    assert config.units_per_iteration == 4
    assert config.total_updates == 80
    assert config.trained_timesteps == 1
    assert not config.decoupled
    assert config.max_ratio_error == 1e-4
    for override in ("max_staleness=1", "model.dtype=bfloat16", "diffusion.storage_dtype=float16"):
        assert load_config(None, [override]).decoupled
    assert not load_config(None, ["max_staleness=1", "ppo.decoupled=never"]).decoupled


_KEYS = st.one_of(
    st.sampled_from([".".join(path) for path in field_paths(Config)]),
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


@given(st.lists(st.tuples(_KEYS, _VALUES), max_size=3), st.booleans())
def test_random_overrides_only_ever_raise_config_errors(
    pairs: list[tuple[str, str]], with_rewards: bool
) -> None:
    base = {"rewards": [{"name": "shapes"}]} if with_rewards else None
    # Any other error than ConfigError would reach the user as a traceback: it fails this test.
    with contextlib.suppress(ConfigError):
        config = load_config(None, [f"{key}={value}" for key, value in pairs], base)
        assert make_config(config.model_dump()) == config or "nan" in str(config)


# ---- presets -----------------------------------------------------------------------------------

PRESETS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_passes_the_checks_of_a_dry_run(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_ray.driver import check_inputs

    # Files of others, which the repository does not ship, in their real formats.
    (tmp_path / "refl_data.json").write_text('[{"text": "a cat"}, {"text": "a dog"}]')
    (tmp_path / "imagereward_benchmark.json").write_text('[{"prompt": "a cat"}]')
    for name in ("hps_v2_all.txt", "hps_v2_all_eval.txt"):
        (tmp_path / name).write_text("a cat\na dog\n")
    monkeypatch.setenv("TEXFORCE_PROMPTS", str(tmp_path))
    config = load_config(preset, [])
    prompts = check_inputs(config)
    assert prompts.train
    assert prompts.evaluation
    assert bool(prompts.unseen) == (config.eval.unseen is not None)
    assert (
        config.placement_free() == load_config(preset, ["rollout.num_workers=8"]).placement_free()
    )


def test_sampling_ahead_in_the_actor_that_learns_is_refused() -> None:
    load_config(None, ["learner.colocated=true"])
    with pytest.raises(ConfigError, match=r"max_staleness: 1 with learner\.colocated.*=0"):
        load_config(None, ["learner.colocated=true", "max_staleness=1"])
