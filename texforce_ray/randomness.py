"""Every random choice of a run as a pure function of (seed, stream, iteration, index)."""

from __future__ import annotations

import numpy as np

# One number per purpose: streams never overlap, whatever the seed.
(
    PROMPTS,
    NOISE,
    MINIBATCHES,
    TIMESTEPS,
    EVALUATION,
    BOOTSTRAP,
    TRUNCATION,
    JUDGE,
    FORWARD,
    WINDOW,
) = range(10)


def generator(seed: int, stream: int, *index: int) -> np.random.Generator:
    """A separate generator for one purpose and place in the run."""
    return np.random.default_rng([seed, stream, *index])


def noise_seeds(seed: int, iteration: int, count: int, stream: int = NOISE) -> np.ndarray:
    """Seeds of `count` samples of an iteration, int64 [count], valid for `torch.manual_seed`."""
    return generator(seed, stream, iteration).integers(2**62, size=count, dtype=np.int64)


def minibatches(
    seed: int, iteration: int, epoch: int, count: int, parts: int, shards: int = 1
) -> list[np.ndarray]:
    """A shuffled split of `count` samples into equal `parts`, each int64 [count / parts].

    Sample i always belongs to shard i * shards // count; every part takes equally many samples of
    each shard, those of the first shard first.
    """
    rng = generator(seed, MINIBATCHES, iteration, epoch)
    size = count // shards
    orders = [shard * size + rng.permutation(size) for shard in range(shards)]
    return [
        np.concatenate(pieces)
        for pieces in zip(*(np.split(order, parts) for order in orders), strict=True)
    ]


def window(seed: int, iteration: int, size: int, within: tuple[int, int]) -> list[int]:
    """`size` adjacent steps between the first and the end of `within`, drawn once an iteration."""
    first, end = within
    start = first + int(generator(seed, WINDOW, iteration).integers(end - first - size + 1))
    return list(range(start, start + size))


def trained_steps(
    seed: int, iteration: int, count: int, steps: list[int], chosen: int
) -> np.ndarray:
    """For each of `count` samples, `chosen` of the trainable `steps`, ascending: [count, chosen].

    Returns all steps if `chosen` is at least their number.
    """
    chosen = min(chosen, len(steps))
    order = generator(seed, TIMESTEPS, iteration).random((count, len(steps))).argsort(axis=1)
    return np.sort(np.asarray(steps)[order[:, :chosen]], axis=1)
