"""Line charts and heat maps as SVG, for a report that is one file without scripts.

Everything that could come from a person is escaped by Jinja2 (`Markup.format`); numbers are formatted here.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 620, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 34
TICKS = 5
MOST_CELLS = 20_000  # of a heat map; a larger one would be a file of megabytes

type Number = float | None


class Line(NamedTuple):
    """A line of a chart; a point whose value is None is left out.

    Attributes:
        name: for the legend.
        x: steps, ascending.
        y: values.
        has_points: whether each value is marked, for those that are far apart.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    has_points: bool = False


class _Scale(NamedTuple):
    least: float
    most: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value."""
        return self.start + (value - self.least) / (self.most - self.least) * (self.end - self.start)


def line_chart(title: str, lines: Sequence[Line]) -> Markup | None:
    """Return a chart of lines over steps; None if no line has a point."""
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if y is not None]
    if not points:
        return None
    across = _scale([x for x, _ in points], LEFT, WIDTH - RIGHT)
    up = _scale([y for _, y in points], HEIGHT - BOTTOM, TOP)
    parts = [_grid(across, up)]
    for index, line in enumerate(lines):
        kind = index % 8 + 1
        for run in _runs(line):
            way = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in run)
            parts.append(Markup('<polyline class="line line-{}" points="{}"/>').format(kind, way))
            if line.has_points or len(run) == 1:
                parts += [
                    Markup('<circle class="dot line-{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(
                        kind, across.at(x), up.at(y)
                    )
                    for x, y in run
                ]
    return _framed(title, parts, HEIGHT)


def heat_map(title: str, steps: Sequence[int], rows: Sequence[Sequence[float]], names: Sequence[int]) -> Markup | None:
    """Return a grid of colours, rows by steps; a value of 0 is red. None without values, or with too many.

    Args:
        title: what it shows.
        steps: of the columns.
        rows: values of each row.
        names: numbers of the rows.
    """
    if not rows or not steps or len(rows) * len(steps) > MOST_CELLS:
        return None
    high = max(4.0, min(18.0, 300 / len(rows)))
    wide = (WIDTH - LEFT - RIGHT) / len(steps)
    height = round(TOP + high * len(rows) + BOTTOM)
    most = max(max(row) for row in rows) or 1.0
    parts = []
    for number, row in enumerate(rows):
        for column, value in enumerate(row):
            colour = Markup("dead") if value == 0 else Markup("heat-{}").format(min(9, int(10 * value / most)))
            parts.append(Markup('<rect class="{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"/>').format(
                colour, LEFT + column * wide, TOP + number * high, wide + 0.3, high + 0.3
            ))  # fmt: skip
    every = max(1, math.ceil(len(rows) / 16))
    parts += [
        Markup('<text x="{}" y="{:.1f}" class="tick end">{}</text>').format(
            LEFT - 6, TOP + (index + 0.7) * high, names[index]
        )
        for index in range(0, len(rows), every)
    ]  # fmt: skip
    for index in {0, len(steps) // 2, len(steps) - 1}:
        parts.append(Markup('<text x="{:.1f}" y="{}" class="tick middle">{}</text>').format(
            LEFT + (index + 0.5) * wide, height - BOTTOM + 16, steps[index]
        ))  # fmt: skip
    return _framed(title, parts, height)


def _framed(title: str, parts: Iterable[Markup], height: int) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, title, Markup("").join(parts)
    )


def _grid(across: _Scale, up: _Scale) -> Markup:
    parts = []
    for value in _ticks(up.least, up.most):
        y = up.at(value)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y)
        )
        parts.append(Markup('<text x="{}" y="{:.1f}" class="tick end">{}</text>').format(LEFT - 6, y + 4, short(value)))
    for value in _ticks(across.least, across.most):
        parts.append(Markup('<text x="{:.1f}" y="{}" class="tick middle">{}</text>').format(
            across.at(value), HEIGHT - BOTTOM + 18, short(value)
        ))  # fmt: skip
    return Markup("").join(parts)


def _scale(values: Sequence[float], start: float, end: float) -> _Scale:
    least, most = min(values), max(values)
    if least == most:
        least, most = least - (abs(least) or 1) / 2, most + (abs(most) or 1) / 2
    return _Scale(least, most, start, end)


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers from `least` to `most`."""
    size = 10 ** math.floor(math.log10((most - least) / TICKS))
    width = next(size * each for each in (1, 2, 5, 10) if (most - least) / (size * each) <= TICKS)
    first = math.ceil(least / width)
    return [number * width for number in range(first, math.floor(most / width) + 1)]


def _runs(line: Line) -> list[list[tuple[float, float]]]:
    """The points of a line, in pieces without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def short(value: float) -> str:
    """`12300000` -> `12.3M`: a number as short as a tick needs it."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"
