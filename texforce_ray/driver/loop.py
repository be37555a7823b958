"""The training loop: the algorithm, without its supporting machinery."""

from __future__ import annotations

from texforce_ray.cluster.answers import beside
from texforce_ray.driver.ahead import Sampling, sampling_ahead
from texforce_ray.driver.collect import TrainingBatch, check_masked, is_scored
from texforce_ray.driver.recorder import Record
from texforce_ray.driver.session import Session


async def training_loop(session: Session) -> None:
    """Sample, score, estimate advantages, update, publish; until all iterations are done.

    With max_staleness k = 1, iteration i + 1 is sampled while iteration i is trained on.
    """
    config, policy, recorder = session.config, session.policy, session.recorder
    async with sampling_ahead(config, session.crew, session.prompts.train, policy) as sampling:
        for iteration in range(policy.version, config.iterations):
            async with recorder.iteration(policy, session.estimator, session.crew) as record:
                await _iterate(session, sampling, record, iteration)
                async with session.evaluating(record):
                    sampling.start()  # actors work while the driver evaluates and writes
            session.show(record)


async def _iterate(session: Session, sampling: Sampling, record: Record, iteration: int) -> None:
    # A separate function: its return drops the last references to the trajectories, so the object
    # store has room for the next ones.
    config, policy, recorder = session.config, session.policy, session.recorder
    sampling.start()
    with record.phase("rollout_wait"):
        batch = await sampling.take(iteration)
    # Replay the masks of an earlier attempt at this iteration, so that a repeat is identical.
    mask = is_scored(config, batch.rewards)
    mask &= recorder.directory.recorded_mask(iteration, batch.seeds)
    check_masked(config, batch.rewards, batch.errors, f"iteration {iteration}")
    training = TrainingBatch(batch, mask, *session.estimator.advantages(batch, mask))
    async with beside(recorder.samples(training)) as written:
        with record.phase("update"):
            # A version without its samples could not be repeated with the same masks.
            updated = await policy.update(session.crew, training, before_publishing=written)
    record.trained(training, updated)
    session.estimator.commit()
