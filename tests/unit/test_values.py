"""What a command line says reaches the config as it was written: texts, paths, others' runs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from texforce_ray import evaluate
from texforce_ray.config import Config, PromptSource
from texforce_ray.config.io import load_config, make_config, resolve_run_dir, to_yaml
from texforce_ray.errors import ConfigError, RunDirectoryError
from texforce_ray.paths import named, weighted, weighted_sum
from texforce_ray.records.run_directory import read_config
from texforce_ray.run import _configure, _profiled, _resumed


def _problem(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "/data/exp #3/run",
        "a: b",
        "my prompts #2.txt",
        "yes",
        "1e3",
        "7e12345",
        "[a], b.txt",
        "{a}",
        "*a",
        "- a",
        '"a" and "b"',
        "it's",
        "a\\b",
        "x=y",
        "~/runs",
    ],
)
def test_text_fields_keep_text(text: str) -> None:
    config = load_config(
        None,
        [f"run_dir={text}", f"model.variant={text}", f"eval.prompts.path={text}"],
    )
    assert (config.run_dir, config.model.variant) == (text, text)
    assert config.eval.prompts is not None
    assert config.eval.prompts.path == text
    rewards = {"rewards": [{"name": "shapes"}, {"name": "face"}]}
    config = load_config(None, [f"rewards.1.label={text}"], base=rewards)
    assert config.rewards[1].key == text


def test_quotes_null_and_interpolation_in_text_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "/scratch")

    def variant(text: str) -> str | None:
        return load_config(None, ["model.variant=fp16", f"model.variant={text}"]).model.variant

    assert variant("'fp 16'") == "fp 16"
    assert variant('"a\\tb"') == "a\tb"
    assert variant("'null'") == "null"
    for nothing in ("null", "None", "~", ""):
        assert variant(nothing) is None
    assert variant("${oc.env:SOME_FOLDER}/x #1") == "/scratch/x #1"
    assert variant(r"\${x}") == "${x}"
    assert "run_dir: Input should be a valid string (got None)" in _problem("run_dir=null")


def test_texts_in_lists_and_constructor_arguments_are_not_cut() -> None:
    base = {"rewards": [{"name": "shapes"}], "model": {"denoiser_adapters": ["a", "b"]}}
    config = load_config(
        None,
        [
            "model.denoiser_adapters.1=/data/exp #3/x: y",
            "rewards.0.kwargs.path=/data/exp #3/w.pt",
            "rewards.0.kwargs.rubric=Score: 0 to 10",
            "rewards.0.kwargs.n=1e-3",
            "rewards.0.kwargs.on=true",
            "rewards.0.kwargs.sizes=[1, {a: b}]",
        ],
        base=base,
    )
    assert config.model.denoiser_adapters == ("a", "/data/exp #3/x: y")
    assert config.rewards[0].kwargs == {
        "path": "/data/exp #3/w.pt",
        "rubric": "Score: 0 to 10",
        "n": 1e-3,
        "on": True,
        "sizes": [1, {"a": "b"}],
    }
    lists = load_config(None, ["model.denoiser_adapters=[1e3, yes, '/a #3']"])
    assert lists.model.denoiser_adapters == ("1e3", "yes", "/a #3")
    assert "after the closing bracket" in _problem("model.denoiser_adapters=[a] #3")
    assert "seed: Input should be a valid integer" in _problem("seed=3 # three")


_PLAIN = st.text(alphabet="ab/ #:=,*+$\\{}[]'\"", min_size=1, max_size=12)


@pytest.mark.long
@given(_PLAIN)
def test_plain_values_pass_no_parser_and_are_stored_as_they_are(text: str) -> None:
    config = load_config(
        None, ["run_dir=other"], plain={"run_dir": text, "eval.prompts.path": text}
    )
    assert config.run_dir == text
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config))
        assert load_config(file, stored=True) == config


def test_a_runs_config_resolves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "hidden")
    file = tmp_path / "config.yaml"
    file.write_text("rewards: [{name: shapes, kwargs: {a: 'x${oc.env:SOME_SECRET}'}}]\n")
    with pytest.raises(RunDirectoryError, match=r"rewards\.0\.kwargs\.a holds an interpolation"):
        read_config(tmp_path)
    assert load_config(file).rewards[0].kwargs == {"a": "xhidden"}


@pytest.mark.parametrize("name", ["exp #3", "a: b", "x=1, y", "${oc.env:HOME}", "['a']"])
def test_a_resumed_run_is_the_one_that_was_named(name: str, tmp_path: Path) -> None:
    for folder in (tmp_path / name, tmp_path / "exp"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(Config()))
    run = tmp_path / name
    assert read_config(run, ["iterations=30"]).run_dir == str(run)
    for file in (None, tmp_path / "exp" / "config.yaml"):
        assert _configure(file, run, ["iterations=30"], {}).run_dir == str(run)


def test_profiled_iterations_are_checked() -> None:
    assert _profiled("1, 2") == {"profile": [1, 2]}
    with pytest.raises(ConfigError, match=r"--profile: '1 #2' should be iterations"):
        _profiled("1 #2")


@pytest.mark.parametrize("uri", ["s3://b/x", "gs://b/x", "file:///data/x", "hdfs:/x"])
def test_a_run_directory_is_no_uri(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"run_dir: '{uri}' is a URI.*(mount|the path itself)"):
        resolve_run_dir(load_config(None, [f"run_dir={uri}"]))
    with pytest.raises(ConfigError, match=rf"--resume: '{uri}' is a URI"):
        _resumed(None, uri, [])


# ---- paths with weights, and others' runs ------------------------------------------------------


def test_adapters_whose_paths_hold_the_signs_of_the_syntax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lr=1e-4", "a+b", "a*2", "plain", "a", "b"):
        Path(name).mkdir()
    assert weighted("lr=1e-4") == (1.0, Path("lr=1e-4"))
    assert weighted("lr=1e-4*0.5") == (0.5, Path("lr=1e-4"))
    assert weighted("plain*-1") == (-1.0, Path("plain"))
    assert named("lr=1e-4") == ("", Path("lr=1e-4"))
    assert named("tuned=lr=1e-4") == ("tuned", Path("lr=1e-4"))
    assert named("/no/lr=1e-4") == ("", Path("/no/lr=1e-4"))
    assert weighted_sum("plain*0.5+a*2") == [(0.5, Path("plain")), (1.0, Path("a*2"))]
    assert weighted_sum("a*2*3+lr=1e-4*1e+1") == [(3.0, Path("a*2")), (10.0, Path("lr=1e-4"))]
    assert weighted_sum("plain+none*0.5") == [(1.0, Path("plain")), (0.5, Path("none"))]
    with pytest.raises(ConfigError, match=r"'a\+b' can be read as a and b or a\+b"):
        weighted_sum("a+b")
    with pytest.raises(ConfigError, match=r"'none\*x' neither exists nor looks like DIR\*0\.5"):
        weighted_sum("none*x")


def _stranger(folder: Path, values: dict[str, Any]) -> argparse.Namespace:
    (folder / "config.yaml").write_text(to_yaml(make_config(values)))
    return evaluate.parser().parse_args(["--run", str(folder), "--out", str(folder / "out")])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rewards": [{"target": "os:system"}]}, "rewards.0.target: imports and runs 'os:system'"),
        (
            {"rewards": [{"name": "shapes"}, {"name": "face", "requirements": ["evil==1"]}]},
            "rewards.1.requirements: installs evil==1",
        ),
        (
            {"rewards": [{"name": "face", "environment": "/x/python"}]},
            "rewards.0.environment: runs",
        ),
        ({"rewards": [{"name": "http", "kwargs": {"url": "http://x"}}]}, "rewards.0.kwargs.url"),
        (
            {"rewards": [{"name": "vlm", "kwargs": {"api_key_env": "AWS_SECRET"}}]},
            "rewards.0.kwargs.api_key_env",
        ),
        ({"ray": {"address": "ray://x:1"}}, "ray.address: joins the cluster at"),
        ({"ray": {"environments": "/x"}}, "ray.environments: runs interpreters in"),
    ],
)
def test_others_runs_are_evaluated_with_their_code_only_when_trusted(
    tmp_path: Path, values: dict[str, Any], key: str
) -> None:
    options = _stranger(tmp_path, values)
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}[\s\S]*--trust"):
        evaluate._load(options, {})
    options.trust = True
    assert evaluate._load(options, {}) == make_config(values)


def test_ordinary_runs_and_own_settings_need_no_trust(tmp_path: Path) -> None:
    options = _stranger(tmp_path, {"rewards": [{"name": "shapes"}, {"name": "face"}]})
    options.overrides = ["ray.address=127.0.0.1:1", "rewards.1.environment=/mine/python"]
    config = evaluate._load(options, {})
    assert config.ray.address == "127.0.0.1:1"


def test_prompts_of_an_evaluation_are_plain_paths(tmp_path: Path) -> None:
    file = tmp_path / "my prompts #2.txt"
    file.write_text("a\n")
    label, plain = evaluate._prompts(str(file))
    config = load_config(None, ["eval.prompts.set=shapes"], plain=plain)
    assert (label, config.eval.prompts) == ("my prompts #2", PromptSource(path=str(file)))
    assert evaluate._prompts("shapes")[1]["eval.prompts.set"] == "shapes"
    assert evaluate._prompts("./shapes")[1]["eval.prompts.path"] == "./shapes"
    assert evaluate._prompts("/x/p.jsonl.gz")[0] == "p"
