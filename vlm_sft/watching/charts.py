"""Curves of runs as SVG inside a page: drawn here, so that the page needs no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Points = list[tuple[int, float]]

WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 24
MOST = 300  # points of a line; more are joined by their mean
WIDE = 20  # a positive panel that spans more is logarithmic
LARGEST, SMALLEST = 1e100, 1e-100  # numbers beyond are none that a run can have meant
COLOURS = 8  # colours of the page; with more runs they begin again


@dataclass
class Line:
    """One line: its label, its points, its colour by number, and whether it is dashed."""

    label: str
    points: Points
    colour: int = 0
    dashed: bool = False


@dataclass
class Drawn:
    """A line as it stands in the page: path, dot where there is one point alone, its last value."""

    line: Line
    path: str
    dots: list[tuple[float, float]]
    last: str


@dataclass
class Panel:
    """A chart.

    Attributes:
        title: What is drawn, in English.
        chinese: The same in Chinese.
        lines: As they are drawn.
        across: (place, label) of the marks below.
        up: (place, label) of the marks at the left.
        gone: How many points were no numbers that could be drawn.
    """

    title: str
    chinese: str
    lines: list[Drawn] = field(default_factory=list)
    across: list[tuple[float, str]] = field(default_factory=list)
    up: list[tuple[float, str]] = field(default_factory=list)
    gone: int = 0


def draw(title: str, chinese: str, lines: Sequence[Line], share: bool = False) -> Panel | None:
    """A chart of lines; None where none has a point.

    Args:
        title: In English.
        chinese: In Chinese.
        lines: Each with its points in order; those beyond `LARGEST` are left out and counted.
        share: The numbers are shares of one.
    """
    whole = [
        Line(one.label, [p for p in map(_drawable, one.points) if abs(p[1]) < LARGEST], one.colour, one.dashed)
        for one in lines
    ]
    gone = sum(len(a.points) - len(b.points) for a, b in zip(lines, whole, strict=True))
    whole = [one for one in whole if one.points]
    if not whole:
        return None
    steps = [step for one in whole for step, _ in one.points]
    values = [value for one in whole for _, value in one.points]
    low, high = min(values), max(values)
    log = low > 0 and high / low > WIDE
    first, last = min(steps), max(steps)
    marks = _log_marks(low, high) if log else _marks(min(low, 0.0) if low > -high * 0.1 else low, high)
    bottom, top = min(low, marks[0]), max(high, marks[-1])

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5), 1)

    def y(value: float) -> float:
        place = _place(value, bottom, top, log)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * place, 1)

    drawn = []
    for one in whole:
        points = [(x(step), y(value)) for step, value in _thin(one.points)]
        path = "M" + "L".join(f"{a} {b}" for a, b in points)
        dots = points if len(points) <= 12 else []
        drawn.append(Drawn(one, path, dots, _say(one.points[-1][1], share)))
    across = [(x(step), f"{step:,}") for step in _steps(first, last)]
    return Panel(title, chinese, drawn, across, [(y(mark), _say(mark, share)) for mark in marks], gone)


def _drawable(point: tuple[int, float]) -> tuple[int, float]:
    """A point, on the line where nobody could tell it from that."""
    return point if abs(point[1]) > SMALLEST else (point[0], 0.0 if point[1] == point[1] else point[1])


def _place(value: float, bottom: float, top: float, log: bool) -> float:
    if log:
        value, bottom, top = math.log(value), math.log(bottom), math.log(top)
    return (value - bottom) / (top - bottom) if top > bottom else 0.5


def _marks(low: float, high: float) -> list[float]:
    """About four round numbers from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / 4))
    unit = next(size * k for k in (1, 2, 5, 10) if span / (size * k) <= 5.5)
    start, end = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [round(number * unit, 12) for number in range(start, max(end, start + 1) + 1)]


def _log_marks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [10.0**power * k for power in powers for k in (1, 2, 5)]
    inside = [mark for mark in found if low <= mark <= high]
    step = max(1, round(len(inside) / 5))
    return inside[::step] or [low, high]


def _steps(first: int, last: int) -> list[int]:
    if last <= first:
        return [first]
    return [int(mark) for mark in _marks(float(first), float(last)) if first <= mark <= last and mark == int(mark)]


def _thin(points: Points) -> Points:
    """Not more than `MOST` points: each the mean of those beside each other."""
    if len(points) <= MOST:
        return points
    size = math.ceil(len(points) / MOST)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[len(part) // 2][0], sum(value for _, value in part) / len(part)) for part in parts]


def _say(value: float, share: bool) -> str:
    if share:
        return f"{value:.0%}" if abs(value) >= 0.1 or value == 0 else f"{value:.1%}"
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.2g}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
