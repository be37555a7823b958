"""A torch profile of one task, as bytes: only the driver writes the run directory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any


class TorchTrace:
    """A context manager that records torch's operations, if `wanted`.

    Recording does not change results. `data` afterwards: a Chrome trace, gzipped JSON, or None.
    """

    def __init__(self, wanted: bool) -> None:
        self.data: bytes | None = None
        self._profile: Any = None
        if wanted:
            from torch.profiler import ProfilerActivity, profile

            available = [ProfilerActivity.CPU]
            import torch

            if torch.cuda.is_available():
                available.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=available)

    def __enter__(self) -> TorchTrace:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop recording: the beginning of a long task is enough, and memory is finite."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json.gz"
            profile.export_chrome_trace(str(path))
            self.data = path.read_bytes()
