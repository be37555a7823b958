"""MLflow as a tracker: `track.mlflow`. Imports the package only when one is opened."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from texforce_ray.config import Config, MlflowConfig
from texforce_ray.errors import shareable
from texforce_ray.records.status import State

_STATES = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_AT_ONCE = 100  # parameters that MLflow accepts in one call
_LONGEST = 500  # characters of a parameter that every version accepts


class MlflowLog:
    """One run of an experiment, on a tracking server or in files under the run directory.

    Args:
        settings: `track.mlflow`.
        config: its values become the run's parameters.
        run_dir: where the files go without a `uri`.
        identity: ID of the run to continue; None for a new run.

    Raises:
        mlflow.MlflowException: the server is unreachable or has no such run.
    """

    def __init__(
        self, settings: MlflowConfig, config: Config, run_dir: Path, identity: str | None
    ) -> None:
        # MLflow prefers a database, but files are enough for one run's few numbers.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # A server that is down must not block the run for the many minutes of the defaults.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow.tracking import MlflowClient

        uri = settings.uri or (run_dir / "mlflow").as_uri()
        self._client: Any = MlflowClient(tracking_uri=uri)
        if identity is not None:
            self._client.update_run(identity, "RUNNING")
            self.identity = identity
            return
        known = self._client.get_experiment_by_name(settings.experiment)
        experiment = (
            known.experiment_id if known else self._client.create_experiment(settings.experiment)
        )
        run = self._client.create_run(experiment, run_name=run_dir.name)
        self.identity = str(run.info.run_id)
        self._add_parameters(config)

    def add_scalars(self, values: Mapping[str, float], iteration: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), v, now, iteration) for name, v in values.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def add_image(self, tag: str, image: NDArray[np.uint8], iteration: int) -> None:
        self._client.log_image(self.identity, image, key=tag, step=iteration)

    def close(self, state: State = "finished") -> None:
        self._client.set_terminated(self.identity, _STATES.get(state, "FINISHED"))

    def _add_parameters(self, config: Config) -> None:
        from mlflow.entities import Param

        values = dict(_flat(shareable(config.model_dump(mode="json"))))
        given = [Param(_allowed(key), str(v)[:_LONGEST]) for key, v in values.items()]
        for first in range(0, len(given), _AT_ONCE):
            self._client.log_batch(self.identity, params=given[first : first + _AT_ONCE])


def _allowed(name: str) -> str:
    """A name that MLflow accepts; a reward's label may contain anything.

    Unsupported ASCII characters become `_`, others their code point, so that labels in other
    scripts stay distinct. Nor may a name, used as a path, lead out of its folder.
    """
    plain = "".join(c if c.isascii() else f"_{ord(c):x}" for c in name)
    parts = re.sub(r"[^\w\-. :/]", "_", plain, flags=re.ASCII).split("/")
    return "/".join("_" * max(1, len(p)) if p in ("", ".", "..") else p for p in parts)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        name = f"{prefix}{key}"
        if isinstance(entry, dict | list) and entry:
            yield from _flat(entry, f"{name}.")
        else:
            yield name, entry
