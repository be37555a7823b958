"""Plans that fit a cluster, against an independent check; what a run asks for, by role."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from texforce_ray.cluster.fit import Plan, fit, rollouts_that_fit
from texforce_ray.cluster.packing import most
from texforce_ray.cluster.requests import actor_requests, needs, shortage, totals
from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.errors import ConfigError, ResourceError


def configured(
    rollouts: int = 1,
    learners: int = 1,
    replicas: tuple[int, ...] = (1,),
    *,
    gpus: tuple[float, float, float] = (1, 1, 0),
    cpus: tuple[float, float, float] = (0, 0, 0),
    shards: int | None = None,
    **more: Any,
) -> Config:
    """`gpus`, `cpus`: of a rollout actor, a learner, a reward server."""
    rollout = more.pop("rollout", {})
    return make_config(
        {
            "prompts": {"per_iteration": 4, "samples_per_prompt": 12},
            "rollout": {
                "num_workers": rollouts,
                "batch_size": 12,
                "num_cpus": cpus[0],
                "num_gpus": gpus[0],
            }
            | rollout,
            "learner": {
                "num_workers": learners,
                "gradient_shards": shards or learners,
                "num_cpus": cpus[1],
                "num_gpus": gpus[1],
            },
            "rewards": [
                {
                    "name": "shapes",
                    "label": f"r{i}",
                    "replicas": n,
                    "num_cpus": cpus[2],
                    "num_gpus": gpus[2],
                }
                for i, n in enumerate(replicas)
            ],
            "update": {"minibatches": 1},
            **more,
        }
    )


# ---- an independent check: try every way of giving every actor a node -------------------------


def holds(actors: list[dict[str, float]], node: dict[str, float]) -> bool:
    """Whether one node holds these; every way of giving every share of a GPU a device is tried."""
    for name in {name for actor in actors for name in actor} - {"GPU"}:
        if sum(actor.get(name, 0) for actor in actors) > node.get(name, 0) + 1e-6:
            return False
    whole = sum(actor.get("GPU", 0) for actor in actors if actor.get("GPU", 0) >= 1)
    parts = [actor["GPU"] for actor in actors if 0 < actor.get("GPU", 0) < 1]
    free = int(node.get("GPU", 0)) - int(whole)
    if free < 0:
        return False
    return any(
        all(
            sum(part for part, d in zip(parts, devices, strict=True) if d == device) <= 1 + 1e-6
            for device in range(free)
        )
        for devices in itertools.product(range(free), repeat=len(parts))
    )


def fits(actors: list[dict[str, float]], nodes: list[dict[str, float]]) -> bool:
    for where in itertools.product(range(len(nodes)), repeat=len(actors)):
        groups = [
            [actor for actor, at in zip(actors, where, strict=True) if at == index]
            for index in range(len(nodes))
        ]
        if all(holds(group, node) for group, node in zip(groups, nodes, strict=True)):
            return True
    return False


def actors_of(config: Config) -> list[dict[str, float]]:
    return [dict(r.resources) for r in actor_requests(config, whole=True) for _ in range(r.count)]


amounts, whole = st.sampled_from([0, 0.3, 0.5, 0.7, 1, 2]), st.sampled_from([0, 1, 2])
node = st.fixed_dictionaries(
    {"CPU": st.integers(0, 3), "GPU": st.integers(0, 2), "a": st.sampled_from([0, 1])}
)
nodes_of = st.lists(node, min_size=1, max_size=3)


@st.composite
def small_configs(draw: st.DrawFn) -> Config:
    learners = draw(st.integers(1, 2))
    label = draw(st.sampled_from([None, "a"]))
    rollouts = draw(st.integers(1, 3))
    return configured(
        rollouts,
        learners,
        (draw(st.integers(1, 2)),),
        gpus=(draw(amounts), draw(whole if learners > 1 else amounts), draw(amounts)),
        cpus=(draw(amounts), draw(amounts), draw(amounts)),
        placement={draw(st.sampled_from(["rollout", "learner", "reward"])): label},
        rollout={"min_workers": draw(st.one_of(st.none(), st.integers(1, rollouts)))},
    )


@given(small_configs(), nodes_of)
@settings(max_examples=150, deadline=None)
def test_a_plan_fits_and_no_larger_one_does(config: Config, nodes: list[dict[str, float]]) -> None:
    try:
        plan = fit(config, nodes)
    except ResourceError:
        least = config.model_copy(
            update={
                "rollout": config.rollout.model_copy(update={"num_workers": 1}),
                "learner": config.learner.model_copy(update={"num_workers": 1}),
                "rewards": (config.rewards[0].model_copy(update={"replicas": 1}),),
            }
        )
        assert not fits(actors_of(least), nodes)
        return
    found = plan.config
    assert fits(actors_of(found), nodes)
    assert found.fixed() == config.fixed()
    make_config(found.model_dump())  # all that is checked of a config holds for this one too
    if not plan.changes:
        return
    assert not fits(actors_of(config), nodes)
    if found.rollout.num_workers < config.rollout.num_workers:
        one_more = found.rollout.model_copy(update={"num_workers": found.rollout.num_workers + 1})
        assert not fits(actors_of(found.model_copy(update={"rollout": one_more})), nodes)


@given(
    st.lists(st.tuples(st.fixed_dictionaries({"CPU": amounts, "GPU": amounts}), st.just(1)),
             max_size=3),
    st.fixed_dictionaries({"CPU": amounts, "GPU": amounts}),
    st.integers(1, 3),
    nodes_of,
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_packing_is_exact_on_small_clusters(others, filler, wanted, nodes) -> None:
    fixed = [each for each, _ in others]
    best = next(
        (n for n in range(wanted, -1, -1) if fits(fixed + [filler] * n, nodes)),
        -1,
    )
    assert most(others, filler, wanted, nodes) == best


# ---- plans that a person would expect ----------------------------------------------------------


def changes(plan: Plan) -> dict[str, Any]:
    return {key: after for key, (_, after) in plan.changes.items()}


def test_the_example_of_the_documentation() -> None:
    plan = fit(configured(8, 1), [{"CPU": 8, "GPU": 4}])
    assert changes(plan) == {"rollout.num_workers": 3}
    assert str(plan) == "rollout.num_workers=3"


def test_rollouts_go_first_and_roles_keep_their_proportion() -> None:
    config = configured(8, 2, (2,), gpus=(1, 1, 1))
    assert changes(fit(config, [{"GPU": 8}])) == {"rollout.num_workers": 4}
    assert changes(fit(config, [{"GPU": 5}])) == {
        "rollout.num_workers": 3,
        "learner.num_workers": 1,
        "rewards.0.replicas": 1,
    }
    plan = fit(configured(5, 4), [{"GPU": 4}])
    assert changes(plan) == {"rollout.num_workers": 2, "learner.num_workers": 2}


def test_learners_are_as_many_as_the_shards_can_be_divided_among() -> None:
    plan = fit(configured(6, 6, shards=12), [{"GPU": 9}])
    learners = plan.config.learner.num_workers
    assert 12 % learners == 0
    assert changes(plan) == {"rollout.num_workers": 5, "learner.num_workers": 4}


def test_what_fits_is_left_alone() -> None:
    config = configured(3, 1)
    plan = fit(config, [{"GPU": 2}, {"GPU": 2}])
    assert plan.config == config
    assert not plan.changes


def test_a_node_must_hold_a_whole_actor() -> None:
    config = configured(2, 1, gpus=(2, 1, 0))
    assert changes(fit(config, [{"GPU": 3}, {"GPU": 1}, {"GPU": 1}])) == {"rollout.num_workers": 1}


def test_a_share_of_a_gpu_is_not_made_of_two() -> None:
    config = configured(3, gpus=(0.6, 0, 0))
    assert changes(fit(config, [{"GPU": 2, "CPU": 1}])) == {"rollout.num_workers": 2}


def test_min_workers_follow() -> None:
    config = configured(8, 1, rollout={"min_workers": 4})
    assert changes(fit(config, [{"GPU": 4}])) == {
        "rollout.num_workers": 3,
        "rollout.min_workers": 3,
    }


def test_too_small_a_cluster_is_rejected_with_what_is_short() -> None:
    with pytest.raises(ResourceError, match=r"GPU: 2 needed, 1 free") as error:
        fit(configured(8, 1), [{"GPU": 1}])
    assert "1 x rollout (1 GPU each)" in str(error.value)
    with pytest.raises(ResourceError, match="no single node is large enough for 1 x rollout"):
        fit(configured(1, 1, gpus=(2, 1, 0)), [{"GPU": 1}, {"GPU": 1}, {"GPU": 1}])


def test_roles_land_where_their_resource_is() -> None:
    config = configured(4, 1, placement={"rollout": "big", "learner": "small"})
    nodes = [{"GPU": 8}, {"GPU": 2, "big": 1}, {"GPU": 2, "big": 1}, {"GPU": 1, "small": 1}]
    assert not fit(config, nodes).changes
    assert changes(fit(config, nodes[1:2] + nodes[3:])) == {"rollout.num_workers": 2}
    with pytest.raises(ResourceError, match=r"small: 0.001 needed, 0 free"):
        fit(config, nodes[:3])


def test_an_actor_takes_a_sliver_besides_what_it_asks_for() -> None:
    config = configured(placement={"rollout": "big", "reward": "judges"})
    assert needs(config, config.rollout) == {"CPU": 0, "GPU": 1, "big": 0.001}
    assert needs(config, config.learner) == {"CPU": 0, "GPU": 1}
    assert needs(config, config.rewards[0]) == {"CPU": 0, "GPU": 0, "judges": 0.001}
    own = configured(placement={"rollout": "big"}, rollout={"resources": {"big": 1.0}})
    assert needs(own, own.rollout)["big"] == 1.0  # a larger request for it is kept


def test_one_actor_for_both_roles_asks_once() -> None:
    config = configured(1, 1)
    shared = make_config(config.model_dump() | {"learner": {"colocated": True, "num_gpus": 1}})
    assert totals(actor_requests(shared)) == {"GPU": 1}
    assert rollouts_that_fit(shared, [{"GPU": 1}]) == 1


def test_start_needs_less_than_all() -> None:
    config = configured(8, 1, rollout={"min_workers": 2})
    assert totals(actor_requests(config)) == {"GPU": 3}
    assert totals(actor_requests(config, whole=True)) == {"GPU": 9}


def test_room_in_pieces_that_are_too_small_is_reported() -> None:
    asked = actor_requests(configured(2, 1, gpus=(2, 1, 0)))
    (said,) = shortage(asked, [{"GPU": 2}, {"GPU": 1}, {"GPU": 1}, {"GPU": 1}])
    assert "not in the pieces" in said


@pytest.mark.long
def test_a_large_cluster_takes_seconds() -> None:
    config = configured(600, 8, (16, 16), gpus=(1, 1, 0.5), cpus=(4, 4, 2))
    nodes = [{"CPU": 64.0, "GPU": 8.0} for _ in range(64)]
    assert changes(fit(config, nodes)) == {
        "rollout.num_workers": 512 - 8 - 14,
        "rewards.0.replicas": 14,  # as large a part of 16 as 490 are of 600, or larger
        "rewards.1.replicas": 14,
    }


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"rollout": "GPU"}, "not a custom resource"),
        ({"learner": ""}, "not a resource name"),
        ({"rewards": "x"}, "did you mean placement.reward"),
    ],
)
def test_wrong_placements_are_explained(section: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_config({"placement": section})


def test_an_actor_that_asks_for_no_gpu_cannot_use_one() -> None:
    config = configured(gpus=(1, 0, 0), model={"device": "cuda"})
    with pytest.raises(ConfigError, match=r"model\.device: 'cuda'.*learner\.num_gpus is 0"):
        actor_requests(config)
    actor_requests(config, learner=False)


def test_learners_cannot_share_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"learner\.num_gpus: 0\.5 with learner\.num_workers = 2"):
        configured(1, 2, gpus=(1, 0.5, 0))
    configured(1, 1, gpus=(1, 0.5, 0))


def test_a_shared_actor_has_one_place() -> None:
    with pytest.raises(ConfigError, match=r"placement\.learner"):
        make_config({"learner": {"colocated": True}, "placement": {"learner": "x"}})
    make_config({"learner": {"colocated": True}, "placement": {"learner": "x", "rollout": "x"}})
