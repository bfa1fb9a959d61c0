"""Pictures of ROC curves, reliability and losses, for slides and papers: PNGs on white.

Lines differ by their dashes and by their lightness too, so they can be told apart in grey and by
the colour-blind. They are drawn without matplotlib's axes and legends, which take more time than
all the rest, and leave out names that begin with ``_``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.errors import printable
from featcache.evaluation.curves import MAX_NAMED, Reliability, RocCurve
from featcache.evaluation.figures import DPI, FAINT, INK, PALE, as_png
from featcache.evaluation.history import History
from featcache.formatting import count, decimal, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = (
    ("#1b2733", "-"), ("#d55e00", (0, (5, 1.5))), ("#0072b2", (0, (1.2, 1.2))),
    ("#e69f00", "-"), ("#009e73", (0, (6, 1.5, 1.2, 1.5))), ("#cc79a7", (0, (3, 1))),
)  # fmt: skip
"""Colours of Okabe and Ito (2008), dark and light in turn, and the dashes that go with them."""
assert len(_STYLES) == MAX_NAMED

_WIDTH, _LEFT, _SIDE, _TOP = 4.8, 0.72, 3.75, 0.72  # inches
_MARGIN, _BOTTOM, _LINE = 0.14, 0.62, 0.2  # beside the titles, of a label, of a legend's line
_MAX_NAME, _MAX_PLACE = 18, 30  # characters
_DOTS = (0, (1, 3))
_SHARES = [(tick / 5, f"{tick / 5:g}") for tick in range(6)]
_MAX_HEADS = 30

_Tick = tuple[float, str]


class _Key(NamedTuple):
    """A line of the legend, with a line, a marker or both before it."""

    text: str
    color: str
    dashes: Any = "none"
    marker: str = ""
    width: float = 1.7


class _Plot:
    """A rectangle of a figure with coordinates of its own.

    Args:
        figure: What it is drawn on.
        bottom: Of the rectangle, in inches.
        height: In inches.
        across: The first and last coordinate.
        up: Likewise.
        is_log: Whether each of the two is logarithmic.
    """

    def __init__(
        self, figure: Figure, bottom: float, height: float, *, across: Sequence[float] = (0, 1),
        up: Sequence[float] = (0, 1), is_log: tuple[bool, bool] = (False, False),
    ) -> None:  # fmt: skip
        self._figure, self._bottom, self._height, self._is_log = figure, bottom, height, is_log
        self._across, self._up = (
            np.log10(ends) if log else np.array(ends, float)
            for ends, log in zip((across, up), is_log, strict=True)
        )

    def line(self, xs: Any, ys: Any, color: str, dashes: Any = "-", **style: Any) -> None:
        """Draw a line through points."""
        from matplotlib.lines import Line2D

        style = {"linewidth": 1.7, "solid_capstyle": "butt", **style}
        x, y = self._place(xs, 0), self._place(ys, 1)
        self._figure.add_artist(Line2D(x, y, color=color, linestyle=dashes, **style))

    def mark(self, x: float, y: float, color: str, *, size: float = 7.5) -> None:
        """Draw a diamond."""
        self.line([x], [y], color, marker="D", markersize=size, markeredgecolor="white",
                  markeredgewidth=size / 7)  # fmt: skip

    def segments(self, xs: Any, lows: Any, highs: Any, color: str, **style: Any) -> None:
        """Draw a vertical line from low to high at each x."""
        gap = np.full(len(xs), np.nan)
        ys = np.stack([lows, highs, gap], axis=1).ravel()
        self.line(np.repeat(xs, 3), ys, color, **style)

    def text(
        self, x: float, y: float, text: str, inches: tuple[float, float] = (0, 0), **style: Any
    ) -> None:
        """Write text at a point, moved by inches."""
        right, top = inches[0] / _WIDTH, inches[1] / self._figure.get_figheight()
        x, y = float(self._place([x], 0)[0]) + right, float(self._place([y], 1)[0]) + top
        shown: dict[str, Any] = {"color": INK, "fontsize": 8.5} | style
        self._figure.text(x, y, text, **shown)

    def frame(
        self, across: Sequence[_Tick], up: Sequence[_Tick], labels: tuple[str, str],
        *, has_numbers: bool = True,
    ) -> None:  # fmt: skip
        """Draw the grid, both axes, their numbers and labels; call it first."""
        (left, right), (low, high) = (
            10**ends if log else ends
            for ends, log in zip((self._across, self._up), self._is_log, strict=True)
        )
        at = [x for x, _ in across]
        self.segments(at, [low] * len(at), [high] * len(at), "#e7ebee", linewidth=0.7)
        ys = np.repeat([y for y, _ in up], 3)
        self.line([left, right, np.nan] * len(up), ys, "#e7ebee", linewidth=0.7)
        for y, text in up:
            self.text(left, y, text, (-0.06, 0), ha="right", va="center_baseline")
        for x, text in across if has_numbers else ():
            self.text(x, low, text, (0, -0.06), ha="center", va="top")
        ends = ([left, left, right], [high, low, low]) if up else ([left, right], [low, low])
        self.line(*ends, PALE, linewidth=0.9)
        middle = {"color": FAINT, "fontsize": 9, "va": "center", "ha": "center"}
        x, y = (self._across.mean(), self._up.mean())
        x, y = (10**v if log else v for v, log in zip((x, y), self._is_log, strict=True))
        self.text(x, low, labels[0], (0, -0.32), **middle)
        self.text(left, y, labels[1], (-0.52, 0), rotation=90, **middle)

    def _place(self, values: Any, axis: int) -> npt.NDArray[np.float64]:
        """Return where values lie in the figure, from 0 to 1."""
        start, end = self._up if axis else self._across
        values = np.log10(values) if self._is_log[axis] else np.asarray(values, float)
        shares = (values - start) / (end - start)
        if axis:
            return np.asarray((self._bottom + shares * self._height) / self._figure.get_figheight())
        return np.asarray((_LEFT + shares * _SIDE) / _WIDTH)


def draw_roc(curves: Sequence[RocCurve], where: str, num_samples: int, num_classes: int) -> bytes:
    """Return a picture of ROC curves, a PNG.

    Args:
        curves: One or more; those with an interval are named below the picture.
        where: Run and split, as ``run on test``.
        num_samples: Images.
        num_classes: Of the head.
    """
    named, others = [c for c in curves if c.interval], [c for c in curves if not c.interval]
    keys = list[_Key]()
    for curve, (color, dashes) in zip(named, _STYLES, strict=False):
        text = f"{_short(curve.name)}, {count(curve.num_yes, 'image')}"
        text += f", AUC {_area(curve)}" if len(curves) > 1 else ""
        keys.append(_Key(text, color, dashes))
        if curve.chosen is not None:
            recall, rest = decimal(curve.chosen.recall), decimal(1 - curve.chosen.false_alarms)
            text = f"threshold {curve.chosen.threshold:.3g}: recall {recall}, specificity {rest}"
            keys.append(_Key(text, color, marker="D"))
    if others:
        text = f"{count(len(others), 'class', 'classes')} with larger areas"
        keys.append(_Key(text, PALE, "-", width=0.8))
    if 1 < len(curves) < num_classes:
        missing = count(num_classes - len(curves), "class", "classes")
        keys.append(_Key(f"{missing} without images, or with all of them", PALE))
    figure, bottom = _figure(keys, _SIDE)
    plot = _Plot(figure, bottom, _SIDE)
    plot.frame(_SHARES, _SHARES, ("false alarms (1 - specificity)", "recall (sensitivity)"))
    plot.line([0, 1], [0, 1], FAINT, _DOTS, linewidth=0.8)
    for curve in others:
        plot.line(curve.false_alarms, curve.recalls, PALE, linewidth=0.6, alpha=0.6)
    for curve, (color, dashes) in reversed([*zip(named, _STYLES, strict=False)]):
        plot.line(curve.false_alarms, curve.recalls, color, dashes)
        if curve.chosen is not None:
            plot.mark(curve.chosen.false_alarms, curve.chosen.recall, color)
    mean = decimal(sum(curve.auc for curve in curves) / len(curves))
    title = f"ROC, each class against the rest: mean AUC {mean}"
    if len(curves) == 1:
        title = f"ROC of {_short(curves[0].name)}: AUC {_area(curves[0], '95 %: ')}"
    subtitle = f"{_short(where, _MAX_PLACE)}, {count(num_samples, 'image')}"
    subtitle += "; in brackets: 95 %" if len(curves) > 1 else ""
    return _finish(figure, title, subtitle, keys)


def draw_reliability(facts: Reliability, where: str, task: str) -> bytes:
    """Return a picture of a reliability diagram with the counts of its bins, a PNG.

    Args:
        facts: What is drawn.
        where: Run and split.
        task: Of the run.
    """
    color, points = _STYLES[2][0], facts.points
    keys = [
        _Key("what was found, with 95 % intervals", color, "-", "o", 0.9),
        _Key("as often as the probability says", FAINT, _DOTS, width=0.8),
    ]
    noun, unit = "", "image"
    probability, share = "probability of the most probable class", "share that is right"
    if facts.name is not None:
        noun = f" of {_short(facts.name)}"
        probability, share = f"probability{noun}", f"share that is {_short(facts.name)}"
    elif task == "multilabel":
        unit = "label"
        probability, share = "probability of a label, all labels", "share that has it"
    strip, gap = 0.62, 0.12
    figure, bottom = _figure(keys, _SIDE + gap + strip)
    plot = _Plot(figure, bottom + strip + gap, _SIDE)
    plot.frame(_SHARES, _SHARES, ("", share), has_numbers=False)
    plot.line([0, 1], [0, 1], FAINT, _DOTS, linewidth=0.8)
    xs, shares = [point.mean_prob for point in points], [point.share for point in points]
    lows, highs = zip(*(point.interval for point in points), strict=True)
    plot.segments(xs, lows, highs, color, linewidth=1.1, marker="_", markersize=5)
    plot.line(xs, shares, color, linewidth=0.9, alpha=0.5)
    plot.line(xs, shares, color, "none", marker="o", markersize=5.5, markeredgecolor="white")
    bars = _Plot(figure, bottom, strip, up=(0, 1.45))
    bars.frame(_SHARES, [], (probability, f"{unit}s"))
    middles = [(point.low + point.high) / 2 for point in points]
    most = max(point.num_samples for point in points)
    heights = [point.num_samples / most for point in points]
    width = 0.09 * _SIDE * 72
    bars.segments(middles, [0] * len(points), heights, "#b4c6d8", linewidth=width)
    for point, middle, height in zip(points, middles, heights, strict=True):
        bars.text(middle, height, _brief(point.num_samples), (0, 0.03), fontsize=7, ha="center",
                  va="bottom")  # fmt: skip
    title = f"Reliability{noun}: calibration error {decimal(facts.error)}"
    subtitle = f"{_short(where, _MAX_PLACE)}, {count(facts.num_samples, unit)}"
    return _finish(figure, title, subtitle, keys)


def draw_losses(histories: Sequence[History], name: str) -> bytes | None:
    """Return a picture of the losses by epoch, a PNG; None where there are none to draw.

    Args:
        histories: Of each head.
        name: The run's.
    """
    shown = histories[:_MAX_HEADS]
    names = ["train_loss", "valid_loss"]
    names = [n for n in names if shown and all(n in history.columns for history in shown)]
    if not names or max(len(history.steps) for history in shown) < 2:
        return None
    is_many, step = len(shown) > 1, shown[0].step
    styles = [*zip(names, _STYLES, strict=False)]
    keys = [_Key(column.replace("_", " "), *style) for column, style in styles]
    last, (color, _) = styles[-1]
    marked = [(h, h.best) for h in shown if h.best is not None]
    if marked:
        history, best = marked[0]
        loss = f"{last.replace('_', ' ')} {history.columns[last][best]:.3g}"
        text = f"kept: {step} {history.steps[best]:.3g}, {loss}"
        keys.append(_Key("what is kept" if is_many else text, color, marker="D"))
    figure, bottom = _figure(keys, 2.6)
    values = [value for h in shown for column in names for value in h.columns[column]]
    across, steps, is_path = _scale_steps([at for h in shown for at in h.steps], step)
    up, losses, is_log = _scale_losses(values)
    plot = _Plot(figure, bottom, 2.6, across=across, up=up, is_log=(is_path, is_log))
    plot.frame(steps, losses, ("strength of the penalty" if is_path else step, "loss"))
    style = {"linewidth": 0.7, "alpha": 0.7} if is_many else {}
    for column, (its_color, dashes) in styles:
        for history in shown:
            plot.line(history.steps, history.columns[column], its_color, dashes, **style)
    for history, best in marked:
        at = history.steps[best], history.columns[last][best]
        plot.mark(*at, color, size=4 if is_many else 7.5)
    num_steps = max(len(history.steps) for history in shown)
    heads = f", {count(len(histories), 'head')}" if len(histories) > 1 else ""
    subtitle = f"{_short(name, _MAX_PLACE)}{heads}, {count(num_steps, step)}"
    return _finish(figure, "Losses of the training", subtitle, keys)


def _scale_losses(values: Sequence[float]) -> tuple[tuple[float, float], list[_Tick], bool]:
    """Return the ends of an axis, its ticks, and whether it is logarithmic."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 5:
        low, high = low / 1.2, high * 1.2
        digits = [d * 10.0**power for power in range(-30, 31) for d in (1, 2, 5)]
        ticks = [tick for tick in digits if low <= tick <= high]
        ticks = ticks[:: 1 + len(ticks) // 8]
        return (low, high), [(tick, f"{tick:g}") for tick in ticks], True
    low, high = min(0.0, low * 1.05), high * 1.08 if high > 0 else 1.0
    size = 10.0 ** np.floor(np.log10(high - low))
    size = next(s for s in (size / 5, size / 2, size, size * 2) if (high - low) / s <= 7)
    numbers = range(int(np.ceil(low / size)), int(high / size) + 1)
    return (low, high), [(n * size, f"{n * size:g}") for n in numbers], False


def _scale_steps(
    steps: Sequence[float], kind: str
) -> tuple[tuple[float, float], list[_Tick], bool]:
    """Return the ends of an axis, its ticks, and whether it is logarithmic."""
    low, high = min(steps), max(steps)
    if kind == "strength" and low > 0:
        powers = range(int(np.ceil(np.log10(low))), int(np.floor(np.log10(high))) + 1)
        powers = powers[:: 1 + len(powers) // 8]
        return (low, high), [(10.0**power, f"{10.0**power:g}") for power in powers], True
    sizes = (digit * 10**power for power in range(19) for digit in (1, 2, 5))
    size = next(size for size in sizes if (high - low) / size <= 10)
    numbers = [low, *(n for n in range(size, int(high) + 1, size) if n > low + size / 3)]
    margin = (high - low) * 0.02
    return (low - margin, high + margin), [(n, f"{n:,.0f}") for n in numbers], False


def _figure(keys: Sequence[_Key], height: float) -> tuple[Figure, float]:
    """Return a figure for plots of this height, in inches, and the bottom of the lowest."""
    from matplotlib.figure import Figure

    bottom = _BOTTOM + _LINE * len(keys)
    return Figure((_WIDTH, _TOP + height + bottom), dpi=DPI), bottom


def _finish(figure: Figure, title: str, subtitle: str, keys: Sequence[_Key]) -> bytes:
    """Write the titles and the legend, and return the picture."""
    from matplotlib.lines import Line2D

    height, left = figure.get_figheight(), _MARGIN / _WIDTH
    figure.text(left, 1 - 0.27 / height, title, fontsize=10.5, color=INK)
    figure.text(left, 1 - 0.48 / height, subtitle, fontsize=8.5, color=FAINT)
    for number, key in enumerate(reversed(keys)):
        up = (0.15 + number * _LINE) / height
        at = [x / _WIDTH for x in (_MARGIN, _MARGIN + 0.2, _MARGIN + 0.4)]
        figure.add_artist(Line2D(
            at, [up] * 3, color=key.color, linestyle=key.dashes, linewidth=key.width, markersize=6,
            marker=key.marker or None, markevery=[1], markeredgecolor="white",
        ))  # fmt: skip
        figure.text((_MARGIN + 0.48) / _WIDTH, up, key.text, fontsize=8.5, color=INK,
                    va="center_baseline")  # fmt: skip
    return as_png(figure)


def _short(name: str, longest: int = _MAX_NAME) -> str:
    return shorten(printable(name), longest)


def _area(curve: RocCurve, what: str = "") -> str:
    low, high = curve.interval or (0.0, 1.0)
    return f"{decimal(curve.auc)} ({what}{decimal(low)} to {decimal(high)})"


def _brief(number: int) -> str:
    return f"{number:,}" if number < 100_000 else f"{round(number / 1000):,}k"
