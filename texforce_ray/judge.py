"""Let a vision-language model rank policies: `python -m texforce_ray.judge EVALUATION --url ...`.

The paper's protocol: for each prompt the model sees one image of every policy, at the same seed and
in shuffled order, and ranks them by aesthetics and by coherence with the text, in three rounds.
Images come from `python -m texforce_ray.evaluate --save-images N`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from texforce_ray import randomness
from texforce_ray.console import exit_code
from texforce_ray.errors import ConfigError
from texforce_ray.files import atomic_write_text, check_writable, to_json
from texforce_ray.paths import local_path
from texforce_ray.records.intervals import bootstrap_interval
from texforce_ray.rewards.answers import parse_ranking
from texforce_ray.rewards.chat import ChatClient
from texforce_ray.rewards.images import read_image

CRITERIA = {
    "aesthetics": "how good it looks as an image: composition, colours, detail, no artefacts",
    "coherence": "how well it shows what the text asks for: objects, numbers, colours, positions",
}
_QUESTION = (
    "Here are {count} images, image 1 to image {count}, made from this text: {prompt}\n"
    "Rank them by {criterion}. "
    'Answer with JSON alone: {{"ranking": [...]}}, the numbers of all images, the best one first.'
)


@dataclass(frozen=True)
class Verdict:
    """One answer. ranks: float64 [P], 1 for the best; NaN if the answer was not a ranking."""

    criterion: str
    index: int
    round: int
    ranks: np.ndarray


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.judge",
        description="Rank the policies of an evaluation by a vision-language model.",
    )
    commands.add_argument(
        "evaluation", type=local_path, help="folder written by evaluate --save-images"
    )
    commands.add_argument("--url", required=True, help="an OpenAI-compatible API (.../v1)")
    commands.add_argument("--model", required=True, help="the model's name in that API")
    commands.add_argument("--api-key-env", help="environment variable that holds the key")
    commands.add_argument("--rounds", type=int, default=3, help="times each question is asked (3)")
    commands.add_argument("--images", type=int, help="how many of the saved images to use")
    commands.add_argument("--max-requests", type=int, help="the most questions to ask in all")
    commands.add_argument("--concurrency", type=int, default=8, help="questions asked at once (8)")
    commands.add_argument("--seed", type=int, default=0, help="for shuffling the images")
    for name, default in (("max-tokens", 256), ("temperature", 0), ("request-seed", 0)):
        commands.add_argument(
            f"--{name}",
            type=json.loads,
            default=default,
            metavar="X",
            help=f"sent with each request ({default}); null omits it, if a service rejects it",
        )
    commands.add_argument(
        "--extra-body",
        type=json.loads,
        default={},
        metavar="JSON",
        help="additional fields of each request, e.g. '{\"max_completion_tokens\": 2048}'",
    )
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    prompts, images = load_images(options.evaluation, options.images)
    check_writable(options.evaluation)
    client = ChatClient(
        options.url,
        options.model,
        api_key_env=options.api_key_env,
        connections=options.concurrency,
        max_requests=options.max_requests,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.request_seed,
        extra_body=options.extra_body,
    )
    policies = list(images.values())
    verdicts = judge(client, prompts, policies, options.rounds, options.seed, options.concurrency)
    summary = summarize(list(images), verdicts, prompts)
    atomic_write_text(options.evaluation / "judge.json", to_json(summary, indent=2) + "\n")
    _print(summary)
    print(f"results in {options.evaluation / 'judge.json'}")


def load_images(folder: Path, limit: int | None) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """Prompts, and the images of each policy, uint8 [H, W, 3] each.

    Raises:
        ConfigError: there are no saved images, or those of fewer than two policies.
    """
    listing = folder / "images" / "prompts.json"
    if not listing.is_file():
        raise ConfigError(
            f"{folder} has no images/prompts.json; create it with: python -m "
            f"texforce_ray.evaluate ... --save-images 32 --out {folder}"
        )
    try:
        prompts = [str(prompt) for prompt in json.loads(listing.read_text())][:limit]
        images = {
            policy.name: [read_image(policy / f"{i:05d}.png") for i in range(len(prompts))]
            for policy in sorted(p for p in listing.parent.iterdir() if p.is_dir())
        }
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{listing.parent} cannot be read: {error}") from None
    if len(images) < 2 or not prompts:
        raise ConfigError(
            f"{listing.parent} has {len(prompts)} images of {len(images)} policies; a ranking "
            "needs at least 1 image of 2 policies"
        )
    return prompts, images


def judge(
    client: ChatClient,
    prompts: Sequence[str],
    images: Sequence[Sequence[np.ndarray]],
    rounds: int,
    seed: int = 0,
    concurrency: int = 8,
) -> list[Verdict]:
    """Ask all questions, criteria x prompts x rounds, and return their verdicts; images: [P][N].

    Raises:
        RewardError: the service rejected the request, or the budget is used up.
    """
    questions = [
        (criterion, index, number)
        for number in range(rounds)
        for criterion in CRITERIA
        for index in range(len(prompts))
    ]

    def ask(question: tuple[str, int, int]) -> Verdict:
        criterion, index, number = question
        # Models prefer the first image or the last, so every round has its own order.
        place = list(CRITERIA).index(criterion)
        rng = randomness.generator(seed, randomness.JUDGE, number, place, index)
        order = rng.permutation(len(images))
        text = _QUESTION.format(
            count=len(order), prompt=prompts[index], criterion=CRITERIA[criterion]
        )
        ranking = None
        for _ in range(2):
            ranking = ranking or parse_ranking(
                client.ask(text, [images[policy][index] for policy in order]), len(order)
            )
        ranks = np.full(len(order), np.nan)
        if ranking is not None:
            for rank, shown in enumerate(ranking):
                ranks[order[shown]] = rank + 1
        return Verdict(criterion, index, number, ranks)

    with ThreadPoolExecutor(concurrency) as threads:
        return list(threads.map(ask, questions))


def summarize(
    policies: Sequence[str], verdicts: Sequence[Verdict], prompts: Sequence[str] | None = None
) -> dict[str, object]:
    """Mean rank with a 95 % interval, share of first places, wins over the base.

    The interval resamples prompts (`prompts` lists those of the images) or, without them, images.
    """
    summary: dict[str, object] = {"answers": len(verdicts)}
    summary["unusable"] = int(sum(np.isnan(v.ranks).any() for v in verdicts))
    base = list(policies).index("base") if "base" in policies else None
    for criterion in CRITERIA:
        chosen = [v for v in verdicts if v.criterion == criterion and not np.isnan(v.ranks).any()]
        if not chosen:
            summary[criterion] = {}
            continue
        ranks = np.stack([verdict.ranks for verdict in chosen])
        images = np.array([verdict.index for verdict in chosen])
        # Rounds on one image are not independent samples; their mean is one sample.
        indices = np.unique(images)
        by_image = np.stack([ranks[images == index].mean(axis=0) for index in indices])
        texts = None if prompts is None else [prompts[index] for index in indices]
        found = {}
        for column, name in enumerate(policies):
            low, high = bootstrap_interval(by_image[:, column], texts)
            found[name] = {
                "mean_rank": float(by_image[:, column].mean()),
                "low": low,
                "high": high,
                "first": float((ranks[:, column] == 1).mean()),
            }
            if base is not None and column != base:
                found[name]["better_than_base"] = float((ranks[:, column] < ranks[:, base]).mean())
        summary[criterion] = found
    return summary


def _print(summary: dict[str, object]) -> None:
    print(f"{summary['answers']} answers, {summary['unusable']} of them without a ranking")
    for criterion in CRITERIA:
        found = summary[criterion]
        assert isinstance(found, dict)
        for name, value in found.items():
            line = f"  {criterion:<11} {name:<14} mean rank {value['mean_rank']:.2f}"
            line += f" [{value['low']:.2f}, {value['high']:.2f}], first in {value['first']:.0%}"
            if "better_than_base" in value:
                line += f", better than base in {value['better_than_base']:.0%}"
            print(line)


if __name__ == "__main__":
    sys.exit(main())
