"""Learners do not wait for the device within a minibatch: reading a number would, on a GPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.forward import KINDS, forward_config, sampled
from tests.unit.learners import batch_of, configured, sample
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.forward_learner import ForwardLearner
from texforce_ray.rl.objectives import make_learner
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.precision import to_encoder

Load = Callable[[], Backbone]
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


class Reads(TorchDispatchMode):
    """Counts operations whose result the CPU needs, but for Adam's count of steps: a CPU tensor."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.overloadpacket.__name__ in READS:
            stack = traceback.extract_stack()
            self.count += not any("/torch/optim/" in frame.filename for frame in stack)
        return function(*args, **(kwargs or {}))


def _reads(learner: Any, batch: Any) -> int:
    with Reads() as seen:
        learner.update(batch)
    return seen.count


@pytest.mark.parametrize("microbatch_size", [1, 12])
def test_ppo_reads_twice_an_update_whatever_the_microbatches(
    tiny_backbone: Load, microbatch_size: int
) -> None:
    learner = PpoLearner(
        tiny_backbone(),
        configured(
            objective={"kl_weight": 0.1},
            update={"minibatches": 2},
            learner={"microbatch_size": microbatch_size},
        ),
    )
    batch = batch_of(sample(learner))
    # The gradient's norm and whether the weights are finite; at first, the largest ratio's error.
    assert _reads(learner, batch) == 2 * 2 + 1


def test_the_scale_of_a_minibatch_s_gradient_stays_on_the_device() -> None:
    with Reads() as seen:
        (scaled,), inverse = to_encoder([torch.full((2,), 1e-9)], [torch.zeros(2).half()])
    assert seen.count == 0
    assert scaled.float() * inverse == pytest.approx(1e-9, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_objectives_on_the_forward_process_do_too(tiny_backbone: Load, kind: str) -> None:
    counts = set()
    for size in (1, 8):
        config = forward_config(kind, learner={"microbatch_size": size})
        learner = make_learner(tiny_backbone(), config)
        assert isinstance(learner, ForwardLearner)
        counts.add(_reads(learner, sampled(learner)))
    assert len(counts) == 1, counts
