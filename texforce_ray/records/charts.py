"""Small SVG charts for the report. Colours come from the page's CSS variables `--c0` to `--c7`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 400, 215
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 10, 38
_COLOURS = 8
_BARS = 120  # more iterations than this are averaged into bars of several
_DOTS = 60  # a line of more points is drawn without dots
_FLOOR = 1e-9  # where a logarithmic axis ends when every value is 0

_STANDALONE = (
    "svg{--c0:#2f6fde;--c1:#d9822b;--c2:#1f9d6b;--c3:#8a5bd6;--c4:#c8447c;--c5:#2a9db5;--c6:#8a8f3c;"
    "--c7:#7b8494;font:12px system-ui,sans-serif}text{fill:#667080}polyline{fill:none;"
    "stroke-width:1.6}.grid{stroke:#e3e6eb}.band{opacity:.16}"
)

Number = float | None


@dataclass(frozen=True)
class Series:
    """One line of a chart: `ys[j]` at `xs[j]`; None leaves a gap.

    `spread` is the half-width of a band around the line, of the same length.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[Number]
    spread: Sequence[Number] | None = None


@dataclass(frozen=True)
class Axis:
    """Maps values between `low` and `high` to 0..1 and knows its tick values."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Return where `value` lies; on a logarithmic axis 0 and less lie at the bottom."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return (math.log10(max(value, self.low)) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(values: Sequence[float], *, zero: bool = False, most: int = 5) -> Axis:
    """Return an axis of round numbers around `values`, from 0 if `zero`."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) * 0.1 or 1.0
        low, high = (0.0 if zero else low - pad), high + pad
    rough = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    ticks = tuple(float(f"{k * step:.12g}") for k in range(first, last + 1))
    return Axis(first * step, last * step, ticks)


def log_axis(values: Sequence[float]) -> Axis:
    """Return an axis of powers of ten around the positive ones of `values`."""
    positive = [value for value in values if value > 0] or [_FLOOR]
    first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    if len(positive) < len(values):
        first -= 1  # zeros lie at the bottom and must not look like the smallest value
    last = max(last, first + 1)
    step = math.ceil((last - first) / 6)
    ticks = tuple(10.0**k for k in range(first, last + 1, step))
    return Axis(10.0**first, 10.0**last, ticks, log=True)


def line_chart(
    title: str, series: Sequence[Series], *, zero: bool = False, log: bool = False, note: str = ""
) -> str:
    """Return a `<figure>` with one line per series over the iterations; "" without any value.

    Args:
        title: shown above, escaped here like all texts.
        series: at least one point each, else left out.
        zero: the axis starts at 0.
        log: logarithmic axis.
        note: a few words after the title, such as the unit.
    """
    series = [s for s in series if any(y is not None for y in s.ys)]
    if not series:
        return ""
    values = [y for s in series for y in s.ys if y is not None]
    for s in series:
        values += [e for j, y in enumerate(s.ys) if y is not None for e in _band(s, j, y)]
    axis = log_axis(values) if log else linear_axis(values, zero=zero)
    xs = _iterations([x for s in series for x in s.xs])
    marks = [_axes(xs, axis)]
    for index, s in enumerate(series):
        marks += _line(s, f"var(--c{index % _COLOURS})", xs, axis)
    return _figure(title, note, _legend(series), "".join(marks))


def path_chart(title: str, series: Sequence[Series], across: str, *, note: str = "") -> str:
    """Return a `<figure>` of lines over any quantity `across`, in the order of their points."""
    series = [s for s in series if any(y is not None for y in s.ys)]
    return _figure(title, note, _legend(series), _paths(series, across)) if series else ""


def standalone_paths(title: str, series: Sequence[Series], across: str) -> str:
    """The same as an SVG file of its own, with its legend and colours inside."""
    labels = "".join(
        f'<text x="{_LEFT}" y="{_HEIGHT + 14 + 16 * index}" style="fill:var(--c{index})">'
        f"{escape(name)} {_short(value)}</text>"
        for index, (name, value) in enumerate(_legend(series))
    )
    height = _HEIGHT + 12 + 16 * len(series)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -24 {_WIDTH} {height + 24}" '
        f'width="{1.5 * _WIDTH:.0f}"><style>{_STANDALONE}</style>'
        f'<rect y="-24" width="100%" height="100%" fill="#fff"/>'
        f'<text x="{_LEFT}" y="-8">{escape(title)}</text>{_paths(series, across)}{labels}</svg>\n'
    )


def _paths(series: Sequence[Series], across: str) -> str:
    ys = linear_axis([y for s in series for y in s.ys if y is not None])
    xs = linear_axis([x for s in series for x in s.xs], zero=True)
    marks = [_axes(xs, ys, across)]
    for index, s in enumerate(series):
        marks += _line(s, f"var(--c{index % _COLOURS})", xs, ys)
    return "".join(marks)


def _legend(series: Sequence[Series]) -> list[tuple[str, float]]:
    return [(s.name, next(y for y in reversed(s.ys) if y is not None)) for s in series]


def stacked_bars(
    title: str, xs: Sequence[float], parts: Sequence[tuple[str, Sequence[float]]], *, note: str = ""
) -> str:
    """Return a `<figure>` with one bar per iteration, made of `parts` (name and value per bar)."""
    if not xs or not parts:
        return ""
    width = math.ceil(len(xs) / _BARS)
    xs = _averaged(xs, width)
    parts = [(name, _averaged(values, width)) for name, values in parts]
    axis = linear_axis([sum(v[j] for _, v in parts) for j in range(len(xs))], zero=True)
    scale = _iterations(xs, pad=(xs[-1] - xs[0]) / len(xs) / 2 if len(xs) > 1 else 0.5)
    bar = 0.8 * (_WIDTH - _LEFT - _RIGHT) / max(len(xs), 4)
    marks = [_axes(scale, axis)]
    for j, x in enumerate(xs):
        below = 0.0
        for index, (name, values) in enumerate(parts):
            top, bottom = _y(axis, below + values[j]), _y(axis, below)
            below += values[j]
            marks.append(
                f'<rect x="{_x(scale, x) - bar / 2:.1f}" y="{top:.1f}" width="{bar:.1f}" '
                f'height="{bottom - top:.1f}" fill="var(--c{index % _COLOURS})">'
                f"<title>{escape(name)}: {_short(values[j])} at {_short(x)}</title></rect>"
            )
    legend = [(name, values[-1]) for name, values in parts]
    return _figure(title, note, legend, "".join(marks))


def _line(s: Series, colour: str, xs: Axis, axis: Axis) -> list[str]:
    runs: list[list[int]] = [[]]
    for j, y in enumerate(s.ys):
        if y is not None:
            runs[-1].append(j)
        elif runs[-1]:
            runs.append([])
    marks = []
    for run in filter(None, runs):
        at = [(_x(xs, s.xs[j]), s.ys[j] or 0.0, j) for j in run]
        if s.spread is not None:
            edges = [(x, _band(s, j, y)) for x, y, j in at]
            outline = [(x, high) for x, (_, high) in edges]
            outline += [(x, low) for x, (low, _) in reversed(edges)]
            points = " ".join(f"{x:.1f},{_y(axis, y):.1f}" for x, y in outline)
            marks.append(f'<polygon class="band" points="{points}" fill="{colour}"/>')
        points = " ".join(f"{x:.1f},{_y(axis, y):.1f}" for x, y, _ in at)
        marks.append(f'<polyline points="{points}" stroke="{colour}"/>')
        if len(s.xs) <= _DOTS:
            marks += [
                f'<circle cx="{x:.1f}" cy="{_y(axis, y):.1f}" r="2" fill="{colour}"><title>'
                f"{escape(s.name)}: {_short(y)} at {_short(s.xs[j])}</title></circle>"
                for x, y, j in at
            ]
    return marks


def _band(s: Series, j: int, y: float) -> tuple[float, float]:
    half = (s.spread[j] if s.spread is not None else None) or 0.0
    return y - half, y + half


def _iterations(xs: Sequence[float], pad: float = 0.0) -> Axis:
    low, high = min(xs) - pad, max(xs) + pad
    if low == high:
        low, high = low - 1, high + 1
    ticks = linear_axis([low, high], most=6).ticks
    return Axis(low, high, tuple(t for t in ticks if low <= t <= high and t == round(t)))


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(xs: Axis, ys: Axis, across: str = "iteration") -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    marks = []
    for tick in ys.ticks:
        y = _y(ys, tick)
        marks.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    for tick in xs.ticks:
        x = _x(xs, tick)
        marks.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_short(tick)}</text>'
        )
    middle = (_LEFT + right) / 2
    marks.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{across}</text>')
    return "".join(marks)


def _figure(title: str, note: str, legend: Sequence[tuple[str, float]], marks: str) -> str:
    keys = "".join(
        f'<span><i style="background:var(--c{index % _COLOURS})"></i>{escape(name)} '
        f"<b>{_short(value)}</b></span>"
        for index, (name, value) in enumerate(legend)
    )
    aside = f" <small>{escape(note)}</small>" if note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{aside}</figcaption>'
        f'<div class="legend">{keys}</div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{marks}</svg></figure>\n"
    )


def _averaged(values: Sequence[float], width: int) -> list[float]:
    chunks = [values[j : j + width] for j in range(0, len(values), width)]
    return [sum(chunk) / len(chunk) for chunk in chunks]


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    mantissa, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else ("", "")
    return f"{mantissa}e{int(exponent)}" if mantissa else f"{value:.2g}"
