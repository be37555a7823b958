"""TensorBoard event files without torch and without TensorFlow.

Written synchronously with TensorBoard's own record writer. Its `EventFileWriter` imports the whole
of TensorFlow where that is installed, and reports a full disk only from a background thread.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

_log = logging.getLogger(__name__)


class TensorBoardLog:
    """Scalars and images for TensorBoard. Never stops a run.

    After the first failed write a warning is logged and nothing more is written: these files only
    repeat what `metrics.jsonl` and `images/` hold.

    Args:
        directory: the directory that `tensorboard --logdir` is given; made if missing.
        purge_from: events of this iteration and later ones, in older files of the directory, are
            hidden by TensorBoard: a resumed run writes them again.
    """

    def __init__(self, directory: Path, *, purge_from: int | None = None) -> None:
        self._directory = Path(directory)
        self._records: Any = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # RecordWriter takes any file object: open() keeps this clear of tf.io.gfile.
            file = open(self._unused_path(), "xb")  # noqa: SIM115 - see close()
            self._records = RecordWriter(file)
        except OSError as error:
            self._give_up(error)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_from is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(wall_time=time.time(), step=purge_from, session_log=start))

    def add_scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Write one scalar per entry, all in one event."""
        entries = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()
        ]
        if entries:
            self._write_summary(summary_pb2.Summary(value=entries), iteration)

    def add_image(self, tag: str, image: NDArray[np.uint8], iteration: int) -> None:
        """Write `image` (uint8 `[H,W,3]`) as a PNG."""
        if self._records is None:
            return
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, format="PNG")
        entry = summary_pb2.Summary.Image(
            height=image.shape[0],
            width=image.shape[1],
            colorspace=3,
            encoded_image_string=encoded.getvalue(),
        )
        value = summary_pb2.Summary.Value(tag=tag, image=entry)
        self._write_summary(summary_pb2.Summary(value=[value]), iteration)

    def close(self, state: str = "finished") -> None:  # noqa: ARG002 - as every tracker
        """Close the file. Safe to call twice."""
        if self._records is not None:
            records, self._records = self._records, None
            try:
                records.close()
            except OSError as error:
                self._give_up(error)

    def _unused_path(self) -> Path:
        # TensorBoard reads the files of a directory in the order of their names, so a resumed
        # run's file must sort after the earlier one's, even when both start in the same second.
        stem = f".{socket.gethostname()}.{os.getpid()}"
        seconds = int(time.time())
        while list(self._directory.glob(f"events.out.tfevents.{seconds:010d}*")):
            seconds += 1
        return self._directory / f"events.out.tfevents.{seconds:010d}{stem}.0"

    def _write_summary(self, summary: Any, iteration: int) -> None:
        self._write(event_pb2.Event(wall_time=time.time(), step=iteration, summary=summary))

    def _write(self, event: Any) -> None:
        if self._records is None:
            return
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _log.warning(
            "cannot write TensorBoard events in %s: %s; the run continues without them "
            "(metrics.jsonl holds the same numbers)",
            self._directory,
            error,
        )
        self._records = None
