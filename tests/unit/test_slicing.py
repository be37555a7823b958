"""Which samples meet in a minibatch, a shard, a learner: each of them once."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from texforce_ray import randomness
from texforce_ray.actors.learner import Membership, units_of
from texforce_ray.diffusion.trajectory import Trajectory, concatenate

SMALL = st.integers(1, 5)


def _trajectory(size: int, first: int = 0, version: int = 3) -> Trajectory:
    rows = np.arange(first, first + size)
    return Trajectory(
        prompt_ids=(rows[:, None] + np.arange(4), rows[:, None] * np.ones(3, np.int64)),
        latents=(rows[:, None, None, None, None] + np.zeros((1, 4, 2, 1, 1))).astype(np.float32),
        slots=np.tile(np.arange(4), (size, 1)),
        timesteps=np.array([30, 20, 10]),
        log_probs=(rows[:, None] + np.zeros(3)).astype(np.float32),
        prompts=tuple(f"prompt {row}" for row in rows),
        seeds=rows,
        policy_version=version,
    )


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_joined_trajectories_are_those_of_one_batch(sizes: list[int]) -> None:
    firsts = np.cumsum([0, *sizes])
    joined = concatenate([_trajectory(n, int(f)) for n, f in zip(sizes, firsts, strict=False)])
    whole = _trajectory(sum(sizes))
    assert len(joined) == len(whole)
    assert joined.nbytes == whole.nbytes
    for field in fields(Trajectory):
        mine, theirs = getattr(joined, field.name), getattr(whole, field.name)
        for a, b in zip(mine, theirs, strict=True) if isinstance(mine, tuple) else [(mine, theirs)]:
            assert np.array_equal(a, b), field.name
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None), field.name


def test_trajectories_of_two_policies_are_not_one_batch() -> None:
    with pytest.raises(ValueError, match="3 and 4"):
        concatenate([_trajectory(2), _trajectory(2, version=4)])


@given(parts=SMALL, shards=SMALL, each=SMALL, seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_every_sample_is_in_one_minibatch_and_in_its_own_shard(
    parts: int, shards: int, each: int, seed: int, epoch: int
) -> None:
    count = parts * shards * each
    batches = randomness.minibatches(seed, 1, epoch, count, parts, shards)
    assert sorted(np.concatenate(batches)) == list(range(count))
    for batch in batches:
        for shard, rows in enumerate(np.split(batch, shards)):
            assert set(rows * shards // count) == {shard}


@given(learners=SMALL, share=st.integers(1, 12), unit=st.integers(1, 12))
def test_a_learner_fetches_what_holds_its_samples_and_no_unit_more(
    learners: int, share: int, unit: int
) -> None:
    samples = learners * share
    if samples % unit:
        unit = 1
    for rank in range(learners):
        own = units_of(Membership(rank, learners, "somewhere"), samples, unit)
        held = set(range(own.start * unit, own.stop * unit))
        wanted = set(range(rank * share, (rank + 1) * share))
        assert wanted <= held
        assert all(
            wanted & set(range(u * unit, (u + 1) * unit)) for u in range(own.start, own.stop)
        )


def test_learners_wait_for_each_other_as_long_as_an_update_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They meet first and exchange only after the pass over all samples, maybe hours later."""
    from types import SimpleNamespace

    from texforce_ray.actors.learner import LearnerActor
    from texforce_ray.config.io import make_config
    from texforce_ray.rl import group

    met: list[tuple] = []
    monkeypatch.setattr(
        group, "LearnerGroup", lambda *given: met.append(given) or group.SoloGroup()
    )
    actor = object.__new__(LearnerActor)
    actor.config = make_config({"learner": {"timeout_s": 7000}, "ray": {"start_timeout_s": 180}})
    actor._address = None
    backbone = SimpleNamespace(device="cpu")
    actor.learner = SimpleNamespace(backbone=backbone, group=group.SoloGroup())  # type: ignore[assignment]
    actor._join(Membership(1, 2, "tcp://host:1"))
    assert met == [("tcp://host:1", 1, 2, "cpu", 7000)]


def test_leaving_a_group_does_not_wait_for_dead_peers() -> None:
    import torch
    import torch.distributed as dist

    from texforce_ray.rl.group import LearnerGroup

    together = LearnerGroup("tcp://127.0.0.1:0", 0, 1, torch.device("cpu"), 60)
    assert together.gather(torch.ones(1, 2)).tolist() == [[1, 1]]
    together.close()
    assert not dist.is_initialized()
