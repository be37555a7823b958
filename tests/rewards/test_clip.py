"""CLIP-type rewards on small random models in the real file formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from texforce_ray.config.io import make_config
from texforce_ray.driver.inputs import check_inputs
from texforce_ray.errors import RewardError
from texforce_ray.rewards.base import load_reward
from texforce_ray.rewards.clip import Aesthetic, AestheticHead, ClipScore, PickScore
from texforce_ray.shapes.tokenizer import build_tokenizer

PROMPTS = ["a red circle", "two cats", "a red circle", "many words " * 60]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP directory as the hub's: model, tokenizer, preprocessor_config.json."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    path = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer(["a", "red", "circle", "two", "cats", "many", "words"])
    limit = tokenizer.model_max_length
    config = CLIPConfig(
        projection_dim=24,
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": limit,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 48, "patch_size": 16,
        },
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48).save_pretrained(path)
    return path


def _images(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (len(PROMPTS), height, width, 3), dtype=np.uint8)


def _reference_pixels(image: np.ndarray) -> np.ndarray:
    """OpenAI's own preparation: shorter side by bicubic resize, centre crop, normalise."""
    picture = Image.fromarray(image)
    factor = 48 / min(picture.size)
    size = (int(picture.width * factor), int(picture.height * factor))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (picture.width - 48) // 2, (picture.height - 48) // 2
    cropped = picture.crop((left, top, left + 48, top + 48))
    return (np.array(cropped, dtype=np.float32) / 255 - MEAN) / STD


@torch.no_grad()
def _direct(clip: Path, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Unit image and text embeddings, one sample at a time, and the logit scale."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer = AutoTokenizer.from_pretrained(clip)
    rows = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        pixels = torch.from_numpy(_reference_pixels(image)).permute(2, 0, 1)[None]
        ids = tokenizer(prompt, truncation=True, return_tensors="pt").input_ids
        output = model(input_ids=ids, pixel_values=pixels)
        rows.append((output.image_embeds[0], output.text_embeds[0]))
    seen, said = zip(*rows, strict=True)
    return torch.stack(seen), torch.stack(said), float(model.logit_scale.exp())


@pytest.mark.parametrize("size", [(48, 48), (64, 64), (96, 72), (50, 80)])
def test_clip_score_is_the_cosine_of_a_direct_computation(
    clip: Path, size: tuple[int, int]
) -> None:
    images = _images(*size)
    seen, said, scale = _direct(clip, images)
    expected = (seen * said).sum(-1).tolist()
    assert ClipScore(str(clip)).score(images, PROMPTS, [{}] * 4) == pytest.approx(
        expected, abs=1e-5
    )
    pick = PickScore(str(clip), processor=str(clip)).score(images, PROMPTS, [{}] * 4)
    assert pick == pytest.approx([scale * x for x in expected], abs=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (96, 72)])
def test_preprocessing_equals_the_reference_pixel_for_pixel(
    clip: Path, size: tuple[int, int]
) -> None:
    images = _images(*size)
    prepared = ClipScore(str(clip)).clip.prepare(
        [Image.fromarray(i) for i in images], return_tensors="np"
    )["pixel_values"]
    expected = np.stack([_reference_pixels(i).transpose(2, 0, 1) for i in images])
    assert np.abs(prepared - expected).max() < 1e-6


def test_aesthetic_is_the_head_on_image_embeddings(clip: Path, tmp_path: Path) -> None:
    head = AestheticHead(24).eval()
    torch.save(head.state_dict(), tmp_path / "head.pth")
    images = _images(64, 64)
    seen, _, _ = _direct(clip, images)
    x = seen
    with torch.no_grad():
        for index in (0, 2, 4, 6, 7):  # the places that the published file's keys name
            state = head.state_dict()
            x = x @ state[f"layers.{index}.weight"].T + state[f"layers.{index}.bias"]
    scores = Aesthetic(str(clip), str(tmp_path / "head.pth")).score(images, PROMPTS, [{}] * 4)
    assert scores == pytest.approx(x.squeeze(-1).tolist(), abs=1e-5)


def test_scores_do_not_depend_on_the_batch(clip: Path) -> None:
    reward, images = ClipScore(str(clip)), _images(64, 64)
    alone = [reward.score(images[i : i + 1], PROMPTS[i : i + 1], [{}])[0] for i in range(4)]
    assert reward.score(images, PROMPTS, [{}] * 4) == pytest.approx(alone, abs=1e-6)


def test_weights_that_are_not_there_or_do_not_fit_are_named(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"missing-model"):
        load_reward(
            "texforce_ray.rewards.clip:ClipScore", {"weights": str(tmp_path / "missing-model")}
        )
    head = tmp_path / "head.pth"
    torch.save(AestheticHead(25).state_dict(), head)
    with pytest.raises(RewardError, match=r"head\.pth do not fit"):
        Aesthetic(str(clip), str(head))
    head.write_bytes(b"\x80\x04garbage")
    with pytest.raises(RewardError, match=r"head\.pth cannot be read"):
        Aesthetic(str(clip), str(head))
    with pytest.raises(RewardError, match="owner/repository:file"):
        Aesthetic(str(clip), str(tmp_path / "nowhere.pth"))


def test_a_pickle_in_weights_is_not_run(clip: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "owned",)

    torch.save({"layers.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(RewardError, match="cannot be read"):
        Aesthetic(str(clip), str(tmp_path / "evil.pth"))
    assert not (tmp_path / "owned").exists()


# ---- with gradient ---------------------------------------------------------------------------


def _tensors(images: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).requires_grad_()


@pytest.mark.parametrize("shape", [(48, 48), (96, 64)])
@pytest.mark.parametrize("kind", [ClipScore, PickScore])
def test_the_differentiable_score_is_the_score(
    clip: Path, kind: type[ClipScore], shape: tuple[int, int]
) -> None:
    reward = kind(str(clip), processor=None, device="cpu")
    # Smooth images: Pillow rounds to 8 bits after its resize, torch does not.
    images = np.ascontiguousarray(np.sort(_images(*shape), axis=1))
    pixels = _tensors(images)
    scores = reward.score_differentiable(pixels, PROMPTS)
    expected = reward.score(images, PROMPTS, [{}] * 4)
    assert scores.tolist() == pytest.approx(expected, abs=2e-3 * reward.scale)
    scores.sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad.abs().amax(dim=(1, 2, 3)) > 0).all(), "an image without a gradient"


def test_the_differentiable_aesthetic_score_is_the_score(clip: Path, tmp_path: Path) -> None:
    head = AestheticHead(24).eval()
    torch.save(head.state_dict(), tmp_path / "head.pth")
    reward = Aesthetic(str(clip), head=str(tmp_path / "head.pth"), device="cpu")
    images = _images(48, 48)
    pixels = _tensors(images)
    scores = reward.score_differentiable(pixels, PROMPTS)
    assert scores.tolist() == pytest.approx(reward.score(images, PROMPTS, [{}] * 4), abs=1e-3)
    scores.sum().backward()
    assert pixels.grad is not None


def test_the_shapes_scorer_reads_true_renderings_and_has_a_gradient() -> None:
    from texforce_ray.rewards.differentiable import total_of
    from texforce_ray.rewards.shapes_scorer import ShapesScorer
    from texforce_ray.shapes.scene import parse, render

    rng = np.random.default_rng(0)
    right = ["a green circle", "three red squares", "a red triangle and a blue square"] * 8
    wrong = ["a red circle", "a red square", "a purple circle and a black triangle"] * 8
    images = np.stack([render(parse(prompt), rng) for prompt in right])
    reward = ShapesScorer(device="cpu")
    good, bad = (np.array(reward.score(images, p, [{}] * 24)) for p in (right, wrong))
    assert (good > bad).mean() > 0.95
    assert good.mean() > 0.8
    config = make_config(
        {"rewards": [{"name": "shapes_scorer", "weight": 2}, {"name": "shapes", "weight": 0}]}
    )
    pixels = _tensors(images)
    total = total_of(config.rewards, "cpu")(pixels, right)
    assert total.tolist() == pytest.approx((2 * good).tolist(), abs=1e-5)
    total.sum().backward()
    assert pixels.grad is not None


def test_a_reward_without_a_gradient_is_refused_before_anything_starts() -> None:
    with pytest.raises(RewardError, match=r"'shapes' has no gradient.*shapes_scorer"):
        check_inputs(
            make_config({"objective": {"kind": "direct"}, "rewards": [{"name": "shapes"}]})
        )
    check_inputs(
        make_config({"objective": {"kind": "direct"}, "rewards": [{"name": "shapes_scorer"}]})
    )
