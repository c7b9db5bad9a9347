"""Pictures as inline SVG, for a page that needs nothing else: bars, histograms, lines and points.

Colours are CSS variables of the page, so that one picture does in light and in dark; a shape or a dash says what a
colour says. Text from outside is escaped here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

SERIES = 6  # colours there are, as --series-0 to --series-5
SHAPES = 4  # and shapes, so that SERIES * SHAPES names can be told apart


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot: where it is, which colour and shape it has, what it is called, how far it spreads."""

    x: float
    y: float
    series: int
    name: str
    spread: float = 0.0
    on_front: bool = False


@dataclass(frozen=True)
class Line:
    """A line of a curve: what it is called, and its points from left to right."""

    name: str
    points: Sequence[tuple[float, float]]


def bar(kept: float, dense: float, longest: float) -> str:
    """A bar as wide as its place, pale up to ``dense`` and solid up to ``kept``, both as a share of ``longest``."""
    share = [100 * max(0.0, value) / longest if longest > 0 else 0.0 for value in (dense, kept)]
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="dense" width="{share[0]:.2f}" height="10"/><rect class="kept" width="{share[1]:.2f}" '
        'height="10"/></svg>'
    )


def histogram_chart(found: dict[str, Any], name: str) -> str:
    """Counts of a `lightning_prune.histograms.histogram`, what stays below and what goes on top of it."""
    kept, gone = found["kept"], found["gone"]
    width, height, foot = 300, 130, 100
    bins, tallest = len(kept), max([k + g for k, g in zip(kept, gone, strict=True)], default=0) or 1
    parts = []
    for i, (stays, goes) in enumerate(zip(kept, gone, strict=True)):
        left, wide = 4 + i * (width - 8) / bins, (width - 8) / bins - 1
        low, high = 88 * stays / tallest, 88 * goes / tallest
        parts.append(f'<rect class="kept" x="{left:.1f}" y="{foot - low:.1f}" width="{wide:.1f}" height="{low:.1f}"/>')
        top = foot - low - high
        parts.append(f'<rect class="gone" x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{high:.1f}"/>')
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{foot}" y2="{foot}"/>')
    parts.append(_text(4, foot + 18, short(found["low"])) + _text(width - 4, foot + 18, short(found["high"]), "end"))
    parts.append(_text(width - 4, 10, f"most in a bin: {tallest:,}", "end"))
    what = f"scores of {name}: {sum(kept):,} kept, {sum(gone):,} gone, from {found['low']:.4g} to {found['high']:.4g}"
    return _picture(width, height, what, parts)


def curve_chart(lines: Sequence[Line], events: Sequence[float], what: str) -> str:
    """Steps of what was kept, from 0 to 1, over optimizer steps; events are upright lines."""
    last = max([x for line in lines for x, _ in line.points] + list(events), default=0.0)
    last = last if last > 0 else 1.0
    frame = _Frame((0.0, last * 1.02), (0.0, 1.05), 560, 240)
    parts = frame.axes("optimizer step", "kept")
    if len(events) <= 60:
        parts += [f'<line class="event" {frame.upright(step)}/>' for step in events]
    for number, line in enumerate(lines):
        path = f"M{frame.at(*line.points[0])}"
        for (_, before), (x, y) in zip(line.points, line.points[1:], strict=False):
            path += f" L{frame.at(x, before)} L{frame.at(x, y)}"
        parts.append(f'<path class="curve s{number % SERIES} dash{number % 3}" d="{path}"/>')
    return _picture(frame.width, frame.height, what, parts)


def scatter_chart(points: Sequence[Point], x_label: str, y_label: str, level: float | None = None) -> str:
    """Points with their spread as upright lines, the front joined by a line, and a level line (of the dense model)."""
    xs, ys = [p.x for p in points], [y for p in points for y in (p.y - p.spread, p.y + p.spread)]
    ys += [] if level is None else [level]
    frame = _Frame(_padded(xs), _padded(ys), 560, 340)
    parts = frame.axes(x_label, y_label)
    if level is not None:
        parts.append(f'<line class="event" {frame.level(level)}/>')
    front = sorted((p for p in points if p.on_front), key=lambda p: (p.x, p.y))
    if len(front) > 1:
        parts.append(f'<path class="front" d="M{" L".join(frame.at(p.x, p.y) for p in front)}"/>')
    for point in points:
        x, y = frame.x(point.x), frame.y(point.y)
        if point.spread:
            low, high = frame.y(point.y - point.spread), frame.y(point.y + point.spread)
            parts.append(f'<line class="spread" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        parts.append(_placed(shape(point.series), x, y, point))
    return _picture(frame.width, frame.height, f"{y_label} against {x_label}, {len(points)} points", parts)


def key(series: int) -> str:
    """The shape and colour of a series, to stand in a line of text."""
    return f'<svg class="key" viewBox="-7 -7 14 14" aria-hidden="true">{shape(series)}</svg>'


def shape(series: int) -> str:
    """Circle, square, triangle or diamond around the origin, in the series' colour."""
    colour = f'class="mark s{series % SERIES}"'
    match series // SERIES % SHAPES:
        case 0:
            return f'<circle {colour} r="5"/>'
        case 1:
            return f'<rect {colour} x="-4.5" y="-4.5" width="9" height="9"/>'
        case 2:
            return f'<path {colour} d="M0 -6 L5.5 4.5 L-5.5 4.5 Z"/>'
        case _:
            return f'<path {colour} d="M0 -6.5 L5.5 0 L0 6.5 L-5.5 0 Z"/>'


def short(value: float) -> str:
    """A number in few signs, for an axis.

    Example:
        >>> [short(value) for value in (0, 0.25, 1234567, 38760.0, 12.5, 1.5e-7)]
        ['0', '0.25', '1.23M', '38.8k', '12.5', '1.5e-07']
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (size if unit != 'k' else 1e3):.3g}{unit}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


@dataclass(frozen=True)
class _Frame:
    """From values to places in a picture with axes."""

    xs: tuple[float, float]
    ys: tuple[float, float]
    width: int
    height: int

    def x(self, value: float) -> float:
        return 62 + (self.width - 80) * (value - self.xs[0]) / (self.xs[1] - self.xs[0])

    def y(self, value: float) -> float:
        return self.height - 50 - (self.height - 70) * (value - self.ys[0]) / (self.ys[1] - self.ys[0])

    def at(self, x: float, y: float) -> str:
        return f"{self.x(x):.1f} {self.y(y):.1f}"

    def upright(self, x: float) -> str:
        return f'x1="{self.x(x):.1f}" x2="{self.x(x):.1f}" y1="20" y2="{self.height - 50}"'

    def level(self, y: float) -> str:
        return f'x1="62" x2="{self.width - 18}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}"'

    def axes(self, x_label: str, y_label: str) -> list[str]:
        parts = []
        for value in _ticks(*self.ys):
            parts += [f'<line class="grid" {self.level(value)}/>', _text(54, self.y(value) + 5, short(value), "end")]
        for value in _ticks(*self.xs):
            parts.append(_text(self.x(value), self.height - 30, short(value), "middle"))
        parts.append(f'<line class="axis" {self.level(self.ys[0])}/>')
        parts.append(_text((self.width + 44) / 2, self.height - 8, x_label, "middle") + _text(4, 12, y_label))
        return parts


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers within a range."""
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * times for times in (1, 2, 5, 10) if (high - low) / (size * times) <= 5)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of values and a little more; never empty."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _placed(mark: str, x: float, y: float, point: Point) -> str:
    note = f"{point.name}: {point.y:.4g} at {point.x:,.4g}"
    return f'<g transform="translate({x:.1f} {y:.1f})">{mark}<title>{escape(note)}</title></g>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _picture(width: int, height: int, what: str, parts: Sequence[str]) -> str:
    label = escape(what)
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
