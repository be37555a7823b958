"""A run's status for a terminal, readable at 80 columns."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from texforce_ray.errors import RunDirectoryError
from texforce_ray.observability.progress import duration
from texforce_ray.records.metrics import read_metrics
from texforce_ray.records.status import Status

_COLOURS = {"finished": "green", "running": "green", "starting": "yellow", "interrupted": "yellow"}
_MANY = 12  # with more actors than this, count them by role and node
_LAST = 5  # iterations shown
_BARS = "▁▂▃▄▅▆▇█"
_TREND = 30  # iterations in the small curve


def run_view(run_dir: Path, status: Status | None, title: str = "") -> RenderableType:
    """Everything about a run; `title`: a line above.

    Raises:
        RunDirectoryError: its files are malformed.
    """
    try:
        return _run_view(run_dir, status, title)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RunDirectoryError(
            f"status.json or metrics.jsonl in {run_dir} is malformed: {error}"
        ) from error


def _run_view(run_dir: Path, status: Status | None, title: str) -> RenderableType:
    parts: list[RenderableType] = [Text(title, style="bold")] if title else []
    parts.append(Text(str(run_dir), style="bold", overflow="fold"))
    metrics = read_metrics(run_dir)
    if status is None:
        parts.append(Text("no status yet: the run is starting, or an earlier version wrote it"))
    else:
        parts += [*_head(status, metrics), *_actors(status), *_queues(status.values)]
    if metrics:
        parts += [Text(), _iterations(metrics)]
    if status is not None:
        parts += _errors(status.values)
    return Group(*parts)


def job_view(
    identity: str, status: str, run_dir: Path | None, tail: Sequence[str]
) -> RenderableType:
    """A job whose run directory cannot be read from here."""
    where = "its log names no run directory yet"
    if run_dir is not None:
        where = f"its run directory {run_dir} cannot be read from this machine"
    lines = [Text(f"job {identity}: {status}", style="bold"), Text(f"{where}; its log ends with:")]
    return Group(*lines, *(Text(f"  {line}", overflow="ellipsis", no_wrap=True) for line in tail))


def _head(status: Status, metrics: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    v = status.values
    done, planned = int(v.get("version", 0)), int(v.get("iterations", 0))
    lasted = float(v["time"]) - float(v.get("started", v["time"]))
    state = Text(status.state, style=_COLOURS.get(status.state, "red"))
    state.append(f"  {duration(lasted)}  driver: pid {v.get('pid')} on {v.get('host')}", "dim")
    head: list[RenderableType] = [state]
    if status.gone:
        head.append(
            Text(f"{status.gone}; below is the last status that it wrote", style="bold red")
        )
    pace = [line["seconds/total"] for line in metrics[-_LAST:] if "seconds/total" in line]
    left = sum(pace) / len(pace) * (planned - done) if pace and status.state == "running" else None
    figures = (
        f"version {done} of {planned}",
        f"reward {_number(v.get('reward'), 3)}",
        f"{_number(v.get('samples_per_second'), 1)} samples/s",
        f"restarts {v.get('restarts', 0)}",
        f"left {duration(left)}",
    )
    return [*head, Text("  ".join(figures))]


def _actors(status: Status) -> list[RenderableType]:
    actors: list[dict[str, Any]] = status.values.get("actors", [])
    if not actors:
        return []
    many = len(actors) > _MANY
    table = Table(box=None, padding=(0, 2, 0, 0), expand=False, header_style="bold")
    for column in ("role" if many else "actor", "node", "doing"):
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    rows = _counted(actors) if many else _listed(actors)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return [Text(), table]


def _listed(actors: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    return [
        (
            actor["name"],
            actor["node"],
            actor["doing"] or actor["state"],
            duration(actor["seconds"]) if actor["doing"] else "",
        )
        for actor in actors
    ]


def _counted(actors: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """One row for each role and node; the time is the longest of its tasks."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for actor in actors:
        groups.setdefault((actor["role"], actor["node"]), []).append(actor)
    rows = []
    for (role, node), members in groups.items():
        states = Counter(member["state"] for member in members)
        what = ", ".join(f"{count} {state}" for state, count in states.most_common())
        longest = max(member["seconds"] for member in members)
        rows.append((f"{role} x {len(members)}", node, what, duration(longest) if longest else ""))
    return rows


def _queues(values: Mapping[str, Any]) -> list[RenderableType]:
    queues = dict(values.get("queues", {}))
    if not queues:
        return []
    inside, before = queues.pop("unscored", 0), queues.pop("admission", 0)
    limit = values.get("unscored_limit")
    waiting = ", ".join(f"{role} {length}" for role, length in queues.items())
    return [
        Text(),
        Text(f"waiting for a free actor: {waiting}", overflow="fold"),
        Text(f"units in sampling and scoring: {inside} of at most {limit}, {before} waiting"),
    ]


def _iterations(metrics: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    columns = {
        "iteration": ("iteration", 0),
        "reward": ("reward/total_mean", 3),
        "masked": ("reward/masked", 0),
        "KL": ("ppo/approx_kl", 6),
        "stale": ("staleness", 0),
        "seconds": ("seconds/total", 1),
        "sampling": ("seconds/rollout_wait", 1),
        "update": ("seconds/update", 1),
    }
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for line in metrics[-_LAST:]:
        table.add_row(*(_number(line.get(key), digits) for key, digits in columns.values()))
    curve = [line.get("reward/total_mean") for line in metrics[-_TREND:]]
    return Group(table, Text(f"reward {_sparkline(curve)}"))


def _sparkline(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if v is None else _BARS[round((v - low) * scale)] for v in values)


def _errors(values: Mapping[str, Any]) -> list[RenderableType]:
    errors = values.get("errors", [])
    if not errors:
        return []
    shown: list[RenderableType] = [Text(), Text("last errors", style="bold")]
    for error in errors:
        when = time.strftime("%H:%M:%S", time.localtime(error["time"]))
        shown.append(Text(f"{when} {error['text']}", overflow="fold"))
    return shown


def _number(value: Any, digits: int) -> str:
    return "-" if not isinstance(value, int | float) else f"{value:.{digits}f}"
