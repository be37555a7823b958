"""Rewards: the contract, the errors, and the environments that they must import in."""

from __future__ import annotations

import ast
import io
import math
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from texforce_ray.errors import (
    RewardError,
    is_device_fault,
    is_out_of_memory,
    redacted,
    shareable,
    shareable_yaml,
)
from texforce_ray.rewards import BUILT_IN, environments, find, resolve
from texforce_ray.rewards.base import Reward, checked_scores, load_reward
from texforce_ray.rewards.check import check_variety
from texforce_ray.rewards.environments import SETS, Environment, build
from texforce_ray.rewards.images import read_image
from texforce_ray.shapes import scene

ROOT = Path(__file__).parents[2]


def _images(count: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    images[0] = 200
    images.flags.writeable = False
    return images


def _score(name: str, images: np.ndarray, prompts: list[str], **kwargs: Any) -> list[float]:
    reward = load_reward(resolve(name, None), kwargs)
    assert isinstance(reward, Reward)
    scores = reward.score(images, prompts, [{}] * len(prompts))
    return checked_scores(scores, len(images), name)


def _jpeg_bytes(image: np.ndarray, quality: int) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image, "RGB").save(buffer, "jpeg", quality=quality)
    return len(buffer.getvalue())


@pytest.mark.parametrize("quality", [95, 50])
def test_jpeg_rewards_are_file_sizes_of_opposite_sign(quality: int) -> None:
    images = _images()
    expected = [_jpeg_bytes(image, quality) / 1000 for image in images]
    more = _score("jpeg_incompressibility", images, [""] * 3, quality=quality)
    less = _score("jpeg_compressibility", images, [""] * 3, quality=quality)
    assert more == expected
    assert less == [-size for size in expected]
    assert less[0] > less[1]


def test_jpeg_default_quality_is_95() -> None:
    images = _images()
    by_default = _score("jpeg_incompressibility", images, [""] * 3)
    assert by_default == _score("jpeg_incompressibility", images, [""] * 3, quality=95)


def test_shapes_reward_reads_the_image_and_the_prompt() -> None:
    prompts = ["a green circle", "two red squares"]
    rng = np.random.default_rng(0)
    images = np.stack([scene.render(scene.parse(prompt), rng) for prompt in prompts])
    assert _score("shapes", images, prompts) == pytest.approx([1, 1], abs=0.05)
    assert max(_score("shapes", images, prompts[::-1])) < 0.5
    with pytest.raises(ValueError, match="not a prompt of the shapes world"):
        _score("shapes", images, ["a dog", "two red squares"])


# ---- loading -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BUILT_IN, "iqa:piqe"])
def test_every_built_in_reward_is_where_the_table_says(name: str) -> None:
    entry = find(name)
    assert entry.packages in SETS
    module, _, name = entry.target.partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    if entry.packages == "light":
        assert isinstance(load_reward(entry.target, {}), Reward)


def test_own_target_wins_and_unknown_names_list_the_known() -> None:
    assert resolve(None, "my.module:Mine") == "my.module:Mine"
    with pytest.raises(RewardError, match=r"'shape'.*jpeg_compressibility.*shapes.*target"):
        resolve("shape", None)


OWN_REWARDS = """
class Mine:
    def score(self, images, prompts, metadata):
        return [1]

class WithoutScore:
    pass

class Unwilling(Mine):
    def __init__(self, size=1):
        raise OSError(f"no weights of size {size}")
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reward_ok.py").write_text(OWN_REWARDS)
    (tmp_path / "own_reward_broken.py").write_text("import no_such_library_at_all")
    (tmp_path / "own_reward_syntax.py").write_text("def (")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("target", "kwargs", "parts"),
    [
        ("no.such.module:Mine", {}, ["cannot import no.such.module", "ModuleNotFoundError"]),
        ("own_reward_broken:Mine", {}, ["cannot import", "no_such_library_at_all"]),
        ("own_reward_syntax:Mine", {}, ["cannot import", "SyntaxError"]),
        ("own_reward_ok:Yours", {}, ["own_reward_ok has no class Yours"]),
        ("own_reward_ok:WithoutScore", {}, ["has no method score(images, prompts, metadata)"]),
        ("own_reward_ok:Mine", {"size": 3}, ["{'size': 3}", "TypeError", "size"]),
        ("own_reward_ok:Unwilling", {"size": 3}, ["OSError: no weights of size 3"]),
    ],
)
def test_unusable_reward_is_named_with_the_reason(
    own_module: None, target: str, kwargs: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(RewardError) as caught:
        load_reward(target, kwargs)
    for part in [f"reward {target}", *parts]:
        assert part in str(caught.value)


def test_own_reward_needs_no_base_class(own_module: None) -> None:
    assert load_reward("own_reward_ok:Mine", {}).score(_images(1), [""], [{}]) == [1]


# ---- images that people have -------------------------------------------------------------


def _saved(image: Image.Image, path: Path, **options: Any) -> np.ndarray:
    image.save(path, **options)
    return read_image(path)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    gray = np.arange(256, dtype=np.uint16)[None] * 257
    shown = _saved(Image.fromarray(gray), tmp_path / f"gray.{kind}")
    assert (shown == np.arange(256)[None, :, None]).all()


def test_what_is_transparent_is_shown_over_white(tmp_path: Path) -> None:
    """One visible picture has one score, however it was saved."""
    shown = np.full((4, 4, 3), 255, np.uint8)
    shown[:2] = (200, 30, 90)
    rgba = np.concatenate([shown, np.full((4, 4, 1), 255, np.uint8)], axis=2)
    rgba[2:] = 0  # black, and invisible
    palette = Image.fromarray(shown).quantize(4, dither=Image.Dither.NONE)
    clear = palette.getpixel((0, 3))
    for name, image, options in (
        ("plain", Image.fromarray(shown), {}),
        ("alpha", Image.fromarray(rgba), {}),
        ("palette", palette, {"transparency": clear}),
        ("key", Image.fromarray(rgba[..., :3]), {"transparency": (0, 0, 0)}),
    ):
        assert np.array_equal(_saved(image, tmp_path / f"{name}.png", **options), shown), name
    half = Image.new("LA", (2, 2), (0, 128))
    assert (_saved(half, tmp_path / "half.png") == 127).all()


def test_other_modes_are_shown_as_a_viewer_would(tmp_path: Path) -> None:
    photo = np.zeros((16, 32, 3), np.uint8)
    photo[:, :16] = (250, 10, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right by a viewer
    turned = _saved(Image.fromarray(photo), tmp_path / "turned.jpg", exif=exif, quality=95)
    assert turned.shape == (32, 16, 3)
    assert turned[:14].mean(axis=(0, 1)) == pytest.approx([250, 10, 10], abs=8)
    cmyk = _saved(Image.fromarray(photo).convert("CMYK"), tmp_path / "cmyk.jpg", quality=95)
    assert cmyk[:, :14].mean(axis=(0, 1)) == pytest.approx([250, 10, 10], abs=8)
    bits = Image.fromarray(photo[..., 0] > 100)
    assert (_saved(bits, tmp_path / "bits.png")[0, [0, 31]] == [[255] * 3, [0] * 3]).all()


@pytest.mark.parametrize(("width", "height"), [(20_000, 10_000), (10_000, 10_000)])
def test_a_huge_image_is_refused_by_name(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (width, height)).save(path)
    with pytest.raises(ValueError, match=r"huge\.png: .*too large: at most 64,000,000 pixels"):
        read_image(path)


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("hello")
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "floats.tiff")
    for name, said in (("words.png", "not an image"), ("floats.tiff", "32-bit floats")):
        with pytest.raises(ValueError, match=rf"{name}: .*{said}"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"missing\.png: no such file"):
        read_image(tmp_path / "missing.png")


# ---- errors ------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "broken", "memory"),
    [
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True, False),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            True,
            True,
        ),
        (RuntimeError("HIP error: invalid device function"), True, False),
        (OutOfMemoryError("Tried to allocate 2 GiB"), True, True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True, True),
        (MemoryError("out of memory"), False, True),
        (ValueError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (RuntimeError("no prompt about an error of CUDA"), False, False),
    ],
)
def test_a_broken_gpu_is_told_from_other_errors(
    error: Exception, broken: bool, memory: bool
) -> None:
    assert is_device_fault(error) == broken
    assert is_out_of_memory(error) == memory


def test_logs_hold_no_secret() -> None:
    text = redacted("GET https://me:pw@host:8/v1?size=2&api_key=sk-1 from redis://u@h")
    assert text == "GET https://***@host:8/v1?size=2&api_key=*** from redis://***@h"
    assert redacted("a@b at http://host/x?y=1") == "a@b at http://host/x?y=1"


def test_configs_that_others_see_hold_no_secret() -> None:
    kwargs = {"api_key": "sk-1", "api_key_env": "MY_KEY", "url": "http://me:pw@host/", "low": 0}
    text = "rewards:\n- name: vlm\n  kwargs:\n    api_key: sk-1\n    api_key_env: MY_KEY\n"
    text += "    url: http://me:pw@host/\n    max_tokens: 256\n"
    hidden = {"api_key": "***", "api_key_env": "MY_KEY", "url": "http://***@host/", "low": 0}
    assert shareable({"rewards": [{"kwargs": kwargs}]}) == {"rewards": [{"kwargs": hidden}]}
    assert shareable_yaml(text) == text.replace("sk-1", "***").replace("me:pw", "***")


def test_a_reward_that_says_the_same_of_all_images_fails_the_check() -> None:
    images = list(_images(3))
    with pytest.raises(RewardError, match=r"all 3 different images have the same score, 0\.5"):
        check_variety("mine", [0.5] * 3, images)
    check_variety("mine", [0.5, 0.5, 0.6], images)
    check_variety("mine", [0.5], images[:1])
    check_variety("mine", [0.5] * 2, [images[0], images[0]])


# ---- scores ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores", [[1, 2.5, -3], np.array([1, 2.5, -3], dtype=np.float32), (1.0, np.float64(2.5), -3)]
)
def test_any_sequence_of_numbers_becomes_floats(scores: Any) -> None:
    values = checked_scores(scores, 3, "mine")
    assert values == [1.0, 2.5, -3.0]
    assert {type(value) for value in values} == {float}


def test_nan_says_could_not_score() -> None:
    assert math.isnan(checked_scores([math.nan, 1], 2, "mine")[0])


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ([1.0], "returned 1 numbers for 2 images"),
        ([1.0, 2.0, 3.0], "returned 3 numbers for 2 images"),
        ([], "returned 0 numbers for 2 images"),
        ([1.0, math.inf], "1 infinite numbers; use NaN"),
        ([-math.inf, math.inf], "2 infinite numbers"),
        (None, "returned NoneType"),
        (3.0, "returned float"),
        (["a", "b"], "returned list, which is not a list of numbers"),
        ([None, 1.0], "not a list of numbers"),
        ([[1.0, 2.0], [3.0, 4.0]], "not a list of numbers"),
    ],
)
def test_wrong_scores_name_the_reward_and_the_fault(scores: Any, problem: str) -> None:
    with pytest.raises(RewardError, match="reward mine") as caught:
        checked_scores(scores, 2, "mine")
    assert problem in str(caught.value)


# ---- environments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        "texforce_ray",
        "texforce_ray.errors",
        "texforce_ray.rewards",
        "texforce_ray.rewards.shapes",
        "texforce_ray.rewards.jpeg",
        "texforce_ray.rewards.environments",
        "texforce_ray.rewards.hand",
        "texforce_ray.rewards.face",
        "texforce_ray.actors.reward",
    ],
)
def test_reward_environments_need_no_heavy_library(module: str) -> None:
    heavy = ["torch", "diffusers", "transformers", "peft", "pydantic", "omegaconf"]
    code = (
        f"import sys\nfor name in {heavy}: sys.modules[name] = None\n"
        f"import {module}\nprint(*[n for n in sys.modules if sys.modules[n] is not None])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {*heavy, "ray"}


def test_an_environment_whose_python_is_gone_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = Environment("nothing", ())
    monkeypatch.setattr(Environment, "all_requirements", lambda _: [])
    made = []

    def uv(arguments: list[str], *_: Any) -> None:
        if arguments[0] == "venv":
            made.append(arguments)
            python = Path(arguments[-1]) / "bin/python"
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)

    monkeypatch.setattr(environments, "_uv", uv)
    root = tmp_path / "with a space"
    python = Path(build(environment, root, 60, print))
    assert build(environment, root, 60, print) == str(python)
    assert len(made) == 1
    python.unlink()
    python.symlink_to("/no/such/python")
    assert build(environment, root, 60, print) == str(python)
    assert len(made) == 2
    subprocess.run([python, "-c", ""], check=True)
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "linux-riscv64")
    assert build(environment, root, 60, print) != str(python)


def test_an_isolated_interpreter_is_started_without_the_clusters_paths(tmp_path: Path) -> None:
    from texforce_ray.actors.environments import isolated_command

    python = tmp_path / "with a space" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    code = (
        "import os; print([os.environ.get(n) for n in ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV')])"
    )
    ours = ["/tmp/ray/s/runtime_resources/py_modules_files/a", "/x y/runtime_resources/b"]
    for given, kept in (
        (["/leak", *ours, "/other leak"], ours),
        (["/leak"], []),
        ([], []),
    ):
        done = subprocess.run(
            ["bash", "-c", f"exec {isolated_command(str(python))} -c {shlex.quote(code)}"],
            env=os.environ
            | {"PYTHONPATH": ":".join(given), "PYTHONHOME": "/x", "VIRTUAL_ENV": "/y"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ast.literal_eval(done.stdout) == [":".join(kept), None, None]


# ---- bounded queues ----------------------------------------------------------------------


def test_rollouts_wait_for_slow_rewards() -> None:
    """No more units are sampled but not yet scored than `rollout.max_unscored`."""
    import asyncio

    from texforce_ray.actors.messages import Info, Scores
    from texforce_ray.collect import collect, plan_units
    from texforce_ray.config_io import make_config
    from texforce_ray.prompts import Prompt

    config = make_config(
        {
            "prompts": {"per_iteration": 4, "samples_per_prompt": 4},
            "rollout": {"batch_size": 2, "max_unscored": 3},
            "ppo": {"num_minibatches": 1},
        }
    )
    held = highest = 0

    class Crew:
        """Samples at once, scores slowly."""

        def __init__(self) -> None:
            self.config = config
            self.unscored = asyncio.Semaphore(config.rollout.unscored_units)

        async def sample(self, *_: Any) -> tuple[Info, str, str]:
            nonlocal held, highest
            held += 1
            highest = max(highest, held)
            return Info(0.0), "trajectory", "images"

        async def score(self, _: Any, __: Any, prompts: list[str], ___: Any) -> Scores:
            nonlocal held
            await asyncio.sleep(0.01)
            held -= 1
            return Scores([1.0] * len(prompts), None, 0.01)

        async def redo_if_lost(self, attempt: Any) -> Any:
            return await attempt()

    async def job() -> int:
        units = plan_units(config, [Prompt("a"), Prompt("b")], 0)
        crew: Any = Crew()
        snapshot: Any = "policy"
        return len((await collect(crew, units, snapshot)).rewards)

    assert asyncio.run(job()) == 16
    assert highest == 3
