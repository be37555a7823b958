"""Damaged files of every kind are rejected with a clear error; `make chaos` tries many more."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.fuzz.fuzz import fuzz
from tests.fuzz.surfaces import Surface, surfaces

INPUTS = 60


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Surface]:
    return {surface.name: surface for surface in surfaces(tmp_path_factory.mktemp("seeds"))}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


NAMES = (
    "config file",
    "config override",
    "prompt file",
    "adapter",
    "checkpoint, damaged",
    "checkpoint, forged",
    "run directory: resume",
    "run directory: report",
    "run directory: capacity",
    "run directory: status",
    "samples file",
    "reward request",
)


def test_every_surface_is_fuzzed(found: dict[str, Surface]) -> None:
    assert tuple(found) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_damaged_input_is_read_or_refused(name: str, found: dict[str, Surface]) -> None:
    outcome = fuzz(found[name], INPUTS, seed=7)
    assert not outcome.findings, "\n".join(outcome.findings)
    assert outcome.inputs == INPUTS
    assert outcome.rejected  # or nothing was damaged
