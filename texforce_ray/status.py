"""What a run is doing now: `python -m texforce_ray.status RUN_OR_JOB`, live in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from texforce_ray.console import exit_code
from texforce_ray.errors import ResourceError, RunDirectoryError
from texforce_ray.paths import check_local

if TYPE_CHECKING:
    from rich.console import RenderableType

_RUN_DIRECTORY = re.compile(r"^run directory: (.+?)\s*$", re.MULTILINE)  # as the driver prints it
_REFRESH_S = 2.0
_TAIL = 15  # lines of a job's log


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.status",
        description="A live view of a run: actors by role and node, version, queues, samples/s, "
        "last errors. Ends with the run, or with Ctrl-C. Exit codes: 0, even if the run failed; 1 "
        "if there is no such run.",
    )
    commands.add_argument(
        "run", metavar="RUN_OR_JOB", help="a run directory, or the id of a Ray job"
    )
    commands.add_argument("--once", action="store_true", help="print the view once and exit")
    commands.add_argument(
        "--address",
        help="the job server, e.g. http://head:8265 (default: RAY_API_SERVER_ADDRESS, "
        "RAY_ADDRESS, else this machine)",
    )
    return commands


@dataclass(frozen=True)
class Job:
    """What the job server knows: the job's status and last lines, and its run directory if any."""

    identity: str
    status: str
    run_dir: Path | None
    tail: list[str]

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class Source:
    """A run directory, or a job whose log names its run directory.

    Raises:
        RunDirectoryError: there is no such directory.
        ResourceError: there is no job server, or it has no such job.
    """

    def __init__(self, run: str, address: str | None) -> None:
        self._run, self._client = run, None
        if not Path(run).is_dir():
            if "/" in run:
                check_local(run, "RUN_OR_JOB")
                raise RunDirectoryError(f"{run} is not a run: there is no such directory")
            self._client = _job_client(address)

    def look(self) -> tuple[RenderableType, bool]:
        """The view, and whether it is the last one."""
        from texforce_ray.observability.status_view import job_view, run_view
        from texforce_ray.records.status import ENDED, read_status

        job = self._job()
        run_dir = Path(self._run) if job is None else job.run_dir
        if run_dir is None or (job is not None and not run_dir.is_dir()):
            assert job is not None
            return job_view(job.identity, job.status, job.run_dir, job.tail), job.ended
        status = read_status(run_dir)
        if status is None and not (run_dir / "config.yaml").is_file():
            raise RunDirectoryError(f"{run_dir} is not a run: it has no config.yaml")
        title = "" if job is None else f"job {job.identity}: {job.status}"
        over = (status is not None and status.state in ENDED) or (job is not None and job.ended)
        return run_view(run_dir, status, title), over

    def _job(self) -> Job | None:
        if self._client is None:
            return None
        try:
            status = self._client.get_job_status(self._run)
            text = self._client.get_job_logs(self._run)
        except RuntimeError as error:
            raise ResourceError(f"job {self._run}: {_first_line(error)}") from None
        line = _RUN_DIRECTORY.search(text)
        tail = text.rstrip().splitlines()[-_TAIL:]
        return Job(self._run, str(status), Path(line[1]) if line else None, tail)


def _job_client(address: str | None) -> Any:
    import logging

    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ResourceError(
            f"no job server at {address or 'the default address'}: {_first_line(error)}; give a "
            "run directory, or a job's id with --address http://HEAD:8265 (export "
            "RAY_AUTH_MODE=token if it needs a token)"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser().parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console

    console = Console()
    source = Source(options.run, options.address)
    if options.once or not console.is_terminal:
        console.print(source.look()[0])
        return
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to end a live view
        _live(source, console)


def _live(source: Source, console: Any) -> None:
    from rich.live import Live

    view, over = source.look()
    with Live(view, console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        while True:
            live.update(view, refresh=True)
            if over:
                return
            time.sleep(_REFRESH_S)
            view, over = source.look()


if __name__ == "__main__":
    sys.exit(main())
