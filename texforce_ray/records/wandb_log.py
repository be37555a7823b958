"""Weights & Biases as a tracker: `track.wandb`. Imports the package only when one is opened."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
from numpy.typing import NDArray

from texforce_ray.config import Config, WandbConfig
from texforce_ray.errors import shareable
from texforce_ray.records.status import State

log = logging.getLogger(__name__)

_CLOSE_S = 60.0  # to finish uploading
_INIT_S = 30.0


class WandbLog:
    """One run at Weights & Biases, or on disk (`mode: offline`), under the run directory.

    Args:
        settings: `track.wandb`.
        config: shown with the run.
        run_dir: its files go to `wandb/` in it.
        identity: ID of the run to continue; None for a new run.

    Raises:
        wandb.Error: no connection, wrong key.
    """

    def __init__(
        self, settings: WandbConfig, config: Config, run_dir: Path, identity: str | None
    ) -> None:
        import wandb

        self.identity = identity or secrets.token_hex(4)
        self._run = wandb.init(
            project=settings.project,
            name=settings.name or run_dir.name,
            entity=settings.entity,
            id=self.identity,
            resume="allow",
            mode=settings.mode,
            dir=str(run_dir),
            config=shareable(config.model_dump(mode="json")),
            # It must not take over the terminal, nor read the working directory's git and code.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                init_timeout=_INIT_S,
            ),
        )
        # Not W&B's own steps: they must not decrease, and a grid precedes its iteration's line.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def add_scalars(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log({**values, "iteration": iteration})

    def add_image(self, tag: str, image: NDArray[np.uint8], iteration: int) -> None:
        import wandb

        self._run.log({tag: wandb.Image(image), "iteration": iteration})

    def close(self, state: State = "finished") -> None:
        """Upload the rest, but give up after `_CLOSE_S`: there may be no network."""
        code = 0 if state == "finished" else 1
        closing = threading.Thread(target=self._run.finish, args=(code,), daemon=True)
        closing.start()
        closing.join(_CLOSE_S)
        if closing.is_alive():
            log.warning(
                "track.wandb: the upload is incomplete; finish it later with: "
                "wandb sync RUN_DIR/wandb/run*"
            )


def has_key() -> bool:
    """Whether there is a key, in the environment or from `wandb login`; never returns its value."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
