"""Plots as SVG text: axes, lines, dots and one movable mark. Colours come from the page's style.

Names of strangers become text here and nowhere else: ``escape`` is called on every one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 440, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 14, 46
_MOST_POINTS = 600

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        label: What it shows.
        low: Its first value.
        high: Its last.
        is_log: Whether it is logarithmic; both are above 0 then.
    """

    label: str
    low: float = 0.0
    high: float = 1.0
    is_log: bool = False

    def share(self, value: float) -> float:
        """Return where a value lies, 0 to 1; beyond the ends it is drawn at the end."""
        if self.is_log:
            value = math.log(max(value, self.low))
            low, high = math.log(self.low), math.log(self.high)
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Return about five round values."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            factors = (1, 2, 5) if last - first <= 2 else (1,)
            found = [m * 10.0**e for e in range(first, last + 1) for m in factors]
            return [value for value in found if self.low <= value <= self.high]
        raw = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + i) * step for i in range(count)]


@dataclass(frozen=True)
class Line:
    """A line; the number decides its colour and its dashes.

    Attributes:
        points: Its points.
        number: 0 to 5.
        label: Its name in the legend, empty for none.
        is_faint: Whether it is there for comparison only.
    """

    points: Sequence[Point]
    number: int = 0
    label: str = ""
    is_faint: bool = False


@dataclass(frozen=True)
class Dots:
    """Points; the number decides their colour and their shape.

    Attributes:
        points: Their places.
        number: 0 to 5.
        label: Their name in the legend, empty for none.
        sizes: Radius of each, or empty.
    """

    points: Sequence[Point]
    number: int = 0
    label: str = ""
    sizes: Sequence[float] = field(default=())


@dataclass(frozen=True)
class Mark:
    """The point that is chosen, a diamond with a word. The page's script may move it.

    Attributes:
        at: Its place.
        label: What it is.
        name: By which the script finds it.
    """

    at: Point
    label: str
    name: str = ""


def draw(  # noqa: PLR0917 (what a plot is made of)
    x: Axis, y: Axis, lines: Sequence[Line], dots: Sequence[Dots] = (),
    marks: Sequence[Mark] = (), name: str = "plot", summary: str = "",
) -> str:  # fmt: skip
    """Return a plot as an SVG element.

    Args:
        x: To the right.
        y: Upwards.
        lines: In the order they are drawn.
        dots: Above the lines.
        marks: Above all.
        name: Unique in the page.
        summary: What is seen, for those who do not see it.
    """

    def place(point: Point) -> str:
        right = _LEFT + x.share(point[0]) * (WIDTH - _LEFT - _RIGHT)
        down = HEIGHT - _BOTTOM - y.share(point[1]) * (HEIGHT - _TOP - _BOTTOM)
        return f"{right:.1f},{down:.1f}"

    parts = [_axes(x, y)]
    for line in lines:
        path = " ".join(map(place, _thin(line.points)))
        kind = "faint" if line.is_faint else f"line c{line.number % 6}"
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
    for cloud in dots:
        sizes = cloud.sizes or [3.2] * len(cloud.points)
        shapes = [
            _shape(cloud.number, place(point), size)
            for point, size in zip(cloud.points, sizes, strict=True)
        ]
        parts.append(f'<g class="dots c{cloud.number % 6}">{"".join(shapes)}</g>')
    for mark in marks:
        spot = f' data-mark="{escape(mark.name)}"' if mark.name else ""
        inner = '<path class="mark" d="M0,-7L7,0L0,7L-7,0Z"/>'
        parts.append(f'<g{spot} transform="translate({place(mark.at)})">{inner}</g>')
    frame = f"{_LEFT},{_TOP},{WIDTH - _LEFT - _RIGHT},{HEIGHT - _TOP - _BOTTOM}"
    ends = f"{x.low:.6g},{x.high:.6g},{y.low:.6g},{y.high:.6g}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-summary" '
        f'data-frame="{frame}" data-ends="{ends}">'
        f'<title id="{name}-summary">{escape(summary)}</title>{"".join(parts)}</svg>'
    )


def interval_bar(low: float, high: float, value: float) -> str:
    """Return a small bar from 0 to 1 with an interval and its value."""
    left, right, at = (4 + 152 * share for share in (low, high, value))
    return (
        '<svg class="bar" viewBox="0 0 160 14" aria-hidden="true">'
        '<path class="track" d="M4,7H156"/>'
        f'<path class="reach" d="M{left:.1f},7H{max(right, left + 1):.1f}"/>'
        f'<path class="value" d="M{at:.1f},1V13"/></svg>'
    )


def legend_key(number: int, *, is_line: bool) -> str:
    """Return a small picture of a line or a shape, for a legend."""
    inside = (
        f'<path class="line c{number % 6}" d="M1,7H27"/>' if is_line
        else f'<g class="dots c{number % 6}">{_shape(number, "14,7", 4.5)}</g>'
    )  # fmt: skip
    return f'<svg class="key" viewBox="0 0 28 14" aria-hidden="true">{inside}</svg>'


def _axes(x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for value in x.ticks():
        at = _LEFT + x.share(value) * (right - _LEFT)
        parts.append(f'<path class="grid" d="M{at:.1f},{_TOP}V{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" class="mid">{_number(value)}</text>')
    for value in y.ticks():
        at = bottom - y.share(value) * (bottom - _TOP)
        parts.append(f'<path class="grid" d="M{_LEFT},{at:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 10}" y="{at + 4:.1f}" class="end">{_number(value)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" class="mid name">{escape(x.label)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(14,{middle}) rotate(-90)" class="mid name">'
        f"{escape(y.label)}</text>"
    )
    return f'<g class="axes">{"".join(parts)}</g>'


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def _shape(number: int, place: str, size: float) -> str:
    """Return a circle, square, triangle, cross, diamond or bar, by its number."""
    across, down = map(float, place.split(","))
    r = size
    kind = number % 6
    if kind == 0:
        return f'<circle cx="{across}" cy="{down}" r="{r:.1f}"/>'
    paths = {
        1: f"m{-r:.1f},{-r:.1f}h{2 * r:.1f}v{2 * r:.1f}h{-2 * r:.1f}z",
        2: f"m0,{-1.2 * r:.1f}l{1.2 * r:.1f},{2.1 * r:.1f}h{-2.4 * r:.1f}z",
        3: f"m{-r:.1f},{-r:.1f}l{2 * r:.1f},{2 * r:.1f}m0,{-2 * r:.1f}l{-2 * r:.1f},{2 * r:.1f}",
        4: f"m0,{-1.4 * r:.1f}l{1.4 * r:.1f},{1.4 * r:.1f}l{-1.4 * r:.1f},{1.4 * r:.1f}"
           f"l{-1.4 * r:.1f},{-1.4 * r:.1f}z",
        5: f"m{-1.3 * r:.1f},{-0.5 * r:.1f}h{2.6 * r:.1f}v{r:.1f}h{-2.6 * r:.1f}z",
    }  # fmt: skip
    return f'<path d="M{across},{down}{paths[kind]}"/>'


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    """Return points that look alike: of many, evenly chosen ones and both ends."""
    if len(points) <= _MOST_POINTS:
        return points
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(i * step)] for i in range(_MOST_POINTS)]
