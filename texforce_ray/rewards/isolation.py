"""Environments in which rewards run: pinned sets of packages, each resolved and imported once.

Reward packages conflict with each other and the core (numpy 1 against 2, transformers 4 against 5),
so a reward may have a Python environment of its own: a plain directory, built by uv, named after
its contents, and used by every run on the machine. Ray starts the reward's server with its
interpreter.

    python -m texforce_ray.rewards.environments [SET or REWARD ...]   # build, e.g. in an image

Needs no torch, no pydantic, no Ray.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from texforce_ray.errors import RewardError
from texforce_ray.rewards import find

_TORCH = ("torch==2.13.0", "torchvision==0.28.0")

# Every environment holds these and Ray of the same version (added below): messages need them.
_COMMON = ("numpy", "pillow>=10.1")


@dataclass(frozen=True)
class PackageSet:
    """Requirements, and the imports that check that they work together."""

    requirements: tuple[str, ...]
    imports: tuple[str, ...]


SETS: dict[str, PackageSet] = {
    "light": PackageSet(("scipy>=1.11",), ("PIL", "scipy")),
    "http": PackageSet(("httpx>=0.27",), ("httpx",)),
    "clip": PackageSet((_TORCH[0], "transformers==5.23.0"), ("torch", "transformers")),
    # The last version with models in the wheel; it needs numpy 1.
    "mediapipe": PackageSet(("mediapipe==0.10.21", "numpy<2"), ("mediapipe",)),
    "pyiqa": PackageSet((*_TORCH, "pyiqa==0.1.16", "transformers==5.23.0"), ("pyiqa",)),
    "open-clip": PackageSet((*_TORCH, "open-clip-torch==3.3.0"), ("open_clip",)),
    # image-reward uses clip without declaring it, and names that transformers 4.57 has dropped.
    "image-reward": PackageSet(
        (
            *_TORCH,
            "image-reward==1.5",
            "transformers==4.46.3",
            "diffusers==0.31.0",
            "huggingface-hub==0.26.5",
            "datasets==3.1.0",
            "accelerate==1.1.1",
            "tokenizers<0.21",
            "openai-clip==1.0.1",
            "setuptools<80",
        ),
        ("ImageReward",),
    ),
}


@dataclass(frozen=True)
class Environment:
    """What an environment holds: `name` for people, requirements, imports that must succeed."""

    name: str
    requirements: tuple[str, ...]
    imports: tuple[str, ...] = ()

    @staticmethod
    def of_set(name: str) -> Environment:
        packages = SETS[name]
        return Environment(name, packages.requirements, packages.imports)

    def all_requirements(self) -> list[str]:
        """Requirements with this process's version of Ray: server and driver must use the same."""
        return sorted({f"ray=={version('ray')}", *_COMMON, *self.requirements})

    def directory(self, root: Path) -> Path:
        """Its directory: another requirement, Python or platform means another directory.

        A root may be shared by machines of different architectures.
        """
        platform = [sysconfig.get_platform(), sys.implementation.name]
        key = json.dumps([self.all_requirements(), sys.version_info[:2], platform])
        return root / f"{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def default_root() -> Path:
    """`TEXFORCE_ENVIRONMENTS`, or a folder of the user's cache."""
    given = os.environ.get("TEXFORCE_ENVIRONMENTS")
    return Path(given).expanduser() if given else Path.home() / ".cache/texforce_ray/environments"


def choose(
    name: str | None, environment: str | None, requirements: Sequence[str], label: str
) -> Environment | str | None:
    """Where a reward runs: an environment to build, the path of an interpreter, or (None) here.

    Args:
        name: of a built-in reward; None for a user's class.
        environment: 'driver', 'isolated', a path, or None for the table's default.
        requirements: a user's own; they imply an environment of their own.
        label: the reward's name in errors.

    Raises:
        RewardError: neither a known word nor the path of an interpreter; or 'driver' with
            requirements.
    """
    if environment == "driver":
        if requirements:
            raise RewardError(f"reward {label}: environment 'driver' cannot install requirements")
        return None
    if environment not in (None, "isolated"):
        if not environment.startswith("/"):
            raise RewardError(
                f"reward {label}: environment {environment!r} should be 'driver', 'isolated' or "
                "the absolute path of a Python interpreter"
            )
        return environment
    entry = find(name) if name is not None else None
    by_default = entry is not None and entry.isolated
    if not (by_default or requirements or environment == "isolated"):
        return None
    if entry is None:
        return Environment("custom", tuple(requirements))
    packages = SETS[entry.packages]
    suffix = "-and-more" if requirements else ""
    return Environment(
        entry.packages + suffix, (*packages.requirements, *requirements), packages.imports
    )


Report = Callable[[str], None]


def build(environment: Environment, root: Path, timeout: float, report: Report) -> str:
    """The path of the environment's interpreter; builds the environment first if it is missing.

    Args:
        environment: what it should hold.
        root: folder of all environments.
        timeout: seconds for everything.
        report: receives lines of progress.

    Raises:
        RewardError: with the installer's output and the requirements.
    """
    directory = environment.directory(root)
    python, marker = directory / "bin" / "python", directory / "READY.json"
    if _usable(python, marker):
        return str(python)
    deadline = time.monotonic() + timeout
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_suffix(".lock"), deadline, environment.name, report):
            if _usable(python, marker):  # another process built it while this one waited
                return str(python)
            if marker.exists():
                report(f"environment {environment.name} in {directory} does not run; rebuilding it")
            report(f"building environment {environment.name} in {directory} (once on each node)")
            began = time.monotonic()
            shutil.rmtree(directory, ignore_errors=True)  # remains of a killed build
            requirements = environment.all_requirements()
            _uv(["venv", "--python", sys.executable, str(directory)], deadline, environment, report)
            _uv(
                ["pip", "install", "--compile-bytecode", "--python", str(python), *requirements],
                deadline,
                environment,
                report,
            )
            if environment.imports:
                code = "; ".join(f"import {module}" for module in environment.imports)
                _call([str(python), "-c", code], deadline, environment, report, {})
            marker.write_text(json.dumps({"requirements": requirements}, indent=2) + "\n")
            report(f"environment {environment.name} is ready ({time.monotonic() - began:.0f} s)")
    except OSError as error:
        raise RewardError(
            f"environment {environment.name}: cannot write {directory}: {error}; set "
            "TEXFORCE_ENVIRONMENTS to a folder with room for it"
        ) from None
    return str(python)


def _usable(python: Path, marker: Path) -> bool:
    """Whether an environment is complete and its interpreter still runs: its Python may be gone."""
    if not marker.exists():
        return False
    code = f"import sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    try:
        done = subprocess.run(
            [str(python), "-c", code], env=clean_environment(), timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def clean_environment() -> dict[str, str]:
    """This process's environment variables, without those that select its Python."""
    hidden = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    return {k: v for k, v in os.environ.items() if k not in hidden}


@contextlib.contextmanager
def _locked(path: Path, deadline: float, name: str, report: Report) -> Iterator[None]:
    with path.open("w") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    report(f"another process is building environment {name}; waiting for it")
                waiting = True
            if time.monotonic() > deadline:
                raise RewardError(f"environment {name}: another process is still building it")
            time.sleep(0.5)
        yield


def _uv(arguments: list[str], deadline: float, environment: Environment, report: Report) -> None:
    import uv

    # Ignore project and settings of the current folder; links across disks become copies.
    settings = {"UV_NO_CONFIG": "1", "UV_LINK_MODE": os.environ.get("UV_LINK_MODE", "hardlink")}
    _call([uv.find_uv_bin(), *arguments], deadline, environment, report, settings)


def _call(
    command: list[str],
    deadline: float,
    environment: Environment,
    report: Report,
    settings: dict[str, str],
) -> None:
    """Run a command and report its output line by line; the error quotes the last lines."""
    process = subprocess.Popen(
        command,
        env=clean_environment() | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    output: list[str] = []
    try:
        while True:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            if line is None:
                break
            output.append(line)
            if line.strip() and not line.lstrip().startswith(("+", "~", "-")):
                report(f"[{environment.name}] {line.strip()}")
    except queue.Empty:
        os.killpg(process.pid, signal.SIGKILL)  # with its children
        raise _failed(environment, "took too long and was stopped", output) from None
    finally:
        code = process.wait()
    if code:
        raise _failed(environment, f"failed with exit code {code}", output)


def _failed(environment: Environment, what: str, output: list[str]) -> RewardError:
    wanted = "\n".join(f"  {requirement}" for requirement in environment.all_requirements())
    words = "\n".join(f"  {line}" for line in output[-25:])
    return RewardError(
        f"environment {environment.name}: installing {what}; the installer's output:\n{words}\n"
        f"the requirements:\n{wanted}"
    )


def check_interpreter(path: str) -> str:
    """Return a given interpreter if its Python minor version and Ray equal this process's.

    Raises:
        RewardError: naming the versions that it has and needs.
    """
    code = "import sys, ray, json; print(json.dumps([*sys.version_info[:2], ray.__version__]))"
    try:
        answer = subprocess.run(
            [path, "-c", code],
            env=clean_environment(),  # as when a server is started in it
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RewardError(f"environment {path} cannot be run: {error}") from None
    if answer.returncode:
        raise RewardError(f"environment {path} cannot run a reward: {answer.stderr.strip()[-300:]}")
    found, wanted = json.loads(answer.stdout), [*sys.version_info[:2], version("ray")]
    if found != wanted:
        raise RewardError(
            f"environment {path} has Python {found[0]}.{found[1]} and Ray {found[2]}; it should "
            f"have Python {wanted[0]}.{wanted[1]} and Ray {wanted[2]}, like the driver"
        )
    return path
