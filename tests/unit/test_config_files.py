"""Config files: read, overridden, written and read back, shipped, changed on resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from texforce_ray.config import Config
from texforce_ray.config.io import load_config, make_config, resolve_run_dir, to_yaml
from texforce_ray.errors import ConfigError, RunDirectoryError
from texforce_ray.records.run_directory import check_same

PRESETS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("seed: 3\nupdate: {epochs: 2}\nrewards: [{name: shapes}, {target: 'm:C'}]\n")
    config = load_config(
        path,
        ["objective.clip_range=0.2", "rewards.1.weight=-2", "rewards.1.kwargs.size=7", "seed=4"],
    )
    assert (config.seed, config.update.epochs, config.ppo.clip_range) == (4, 2, 0.2)
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
            "objective": {"max_ratio_error": float("inf")},
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
    assert load_config(path).fixed() == config.fixed()


@pytest.mark.parametrize("path", PRESETS or [None], ids=lambda path: path and path.stem)
def test_every_preset_is_valid(path: Path | None) -> None:
    if path is None:
        pytest.skip("configs/ is empty")
    assert make_config(load_config(path).model_dump()) == load_config(path)


def test_placement_may_change_on_resume_and_nothing_else() -> None:
    base = Config().fixed()
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
    assert load_config(None, moved, base=rewards).fixed() == base
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
        assert load_config(None, [override], base=values).fixed() != base, override


def test_only_what_the_learning_may_need_changes_on_resume(tmp_path: Path) -> None:
    before = Config()
    tuned = ["optimizer.lr=1e-5", "objective.kl_weight=0.1", "iterations=30", "rewards.0.weight=2"]
    rewards = {"rewards": [{"name": "shapes"}]}
    changes = check_same(before, load_config(None, tuned, base=rewards), tmp_path)
    assert changes == {
        "iterations": (20, 30),
        "optimizer.lr": (3e-4, 1e-5),
        "objective.kl_weight": (0.0, 0.1),
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


PRESETS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_passes_the_checks_of_a_dry_run(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from texforce_ray.driver.inputs import check_inputs

    # Files of others, which the repository does not ship, in their real formats.
    (tmp_path / "refl_data.json").write_text('[{"text": "a cat"}, {"text": "a dog"}]')
    (tmp_path / "imagereward_benchmark.json").write_text('[{"prompt": "a cat"}]')
    (tmp_path / "drawbench.txt").write_text("a cat\n")
    for name in ("hps_v2_all.txt", "hps_v2_all_eval.txt"):
        (tmp_path / name).write_text("a cat\na dog\n")
    monkeypatch.setenv("TEXFORCE_PROMPTS", str(tmp_path))
    config = load_config(preset, [])
    prompts = check_inputs(config)
    assert prompts.train
    assert prompts.evaluation
    assert bool(prompts.unseen) == (config.eval.unseen is not None)
    assert config.fixed() == load_config(preset, ["rollout.num_workers=8"]).fixed()
