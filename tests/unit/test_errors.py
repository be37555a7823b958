"""Errors: which are a broken GPU's, and no secret in any of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from texforce_ray.cluster.answers import log_tail
from texforce_ray.errors import (
    is_device_fault,
    is_out_of_memory,
    redacted,
    shareable,
    shareable_yaml,
)


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
def test_a_broken_gpu_is_distinguished_from_other_errors(
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


def test_a_dead_actors_last_lines_are_found_where_ray_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    logs = tmp_path / "ray" / "session_2026-11-27_10-00-00_000000_1" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-abc-01000000-77.err").write_text("starting\nthe disk is on fire\n")
    assert log_tail(77).endswith("starting / the disk is on fire")
    assert log_tail(78) == ""
