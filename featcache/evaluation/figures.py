"""Pictures of results, drawn without a screen and without matplotlib's global state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.errors import printable
from featcache.formatting import percent, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_NAME, DPI = 22, 144
INK, FAINT, PALE = "#1b2733", "#5f6b76", "#9aa5af"

_MAX_CELLS = 40  # classes; of more the picture has shades alone, and names the worst confusions
_MAX_SHADES = 400  # classes that get a row of their own; of more, neighbours share one
_NUM_LISTED = 24


def draw_confusion(confusion: npt.NDArray[Any], classes: Sequence[str], title: str) -> bytes:
    """Return a picture of a confusion matrix, a PNG.

    A cell shows its count and its share of the row, that is of the images with that target; the
    share also decides its shade, so a rare class is as visible as a frequent one. Above 40 classes
    there are shades alone, and beside them the classes that are taken for others most often.

    Args:
        confusion: (C, C) counts, rows = target.
        classes: C names. They are shown as text whatever they hold: no formula, no control code.
        title: One line above the picture.
    """
    confusion = np.asarray(confusion)
    names = [shorten(printable(name), _LONGEST_NAME) for name in classes]
    draw = _draw_cells if len(names) <= _MAX_CELLS else _draw_shades
    figure = draw(confusion, names)
    figure.suptitle(shorten(printable(title), 60), fontsize=11, color=INK)
    return as_png(figure)


def as_png(figure: Figure) -> bytes:
    """Return a figure as a PNG, its texts shown as they are: no formula, no TeX."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a class may be called "$\\frac"
        text.set_usetex(False)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # Names in scripts the font lacks are drawn as boxes: no reason to stop or to complain.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        # A fifth larger than by the usual level, in two thirds of the time.
        options = {"compress_level": 1}
        figure.savefig(picture, format="png", metadata={"Software": None}, pil_kwargs=options)
    return picture.getvalue()


def _shares_of_rows(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.zeros(counts.shape)
    np.divide(counts, rows, out=shares, where=rows > 0)
    return shares


def _draw_cells(confusion: npt.NDArray[Any], names: Sequence[str]) -> Figure:
    """Draw a matrix with a count and a share in each cell."""
    from matplotlib.figure import Figure

    shares = _shares_of_rows(confusion)
    longest = max(len(name) for name in names)
    side = max(0.82 * len(names), 2.6)
    slanted = longest > 9  # more do not fit side by side
    size = (side + 1.3 + 0.085 * longest, side + 1.5)
    figure = Figure(size, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.9)  # stays light: one ink on all
    axes.set_xticks(
        range(len(names)), names, rotation=35 if slanted else 0,
        ha="right" if slanted else "center", rotation_mode="anchor",
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    _label(axes)
    axes.set_xticks(np.arange(1, len(names)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(names)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    _write_cells(axes, confusion, shares)
    return figure


def _draw_shades(confusion: npt.NDArray[Any], names: Sequence[str]) -> Figure:
    """Draw the matrix of many classes, and beside it list what is confused most."""
    from matplotlib.figure import Figure

    figure = Figure((11.0, 7.0), dpi=DPI, layout="constrained")
    axes, listed = figure.subplots(1, 2, width_ratios=[6, 4.4])
    axes.set_anchor("N")
    number = len(names)
    starts = np.unique(np.linspace(0, number, _MAX_SHADES, endpoint=False).astype(int))
    pooled = np.add.reduceat(np.add.reduceat(confusion, starts, 0), starts, 1)
    # The root makes a single image of fifty visible: 0.02 is drawn as 0.14.
    axes.imshow(
        np.sqrt(_shares_of_rows(pooled)), cmap="Blues", vmin=0, vmax=1, interpolation="nearest",
        extent=(0.5, number + 0.5, number + 0.5, 0.5),
    )  # fmt: skip
    _label(axes, f", {number:,} classes by their number")
    totals, wrong = confusion.sum(axis=1), confusion.copy()
    np.fill_diagonal(wrong, 0)
    places = np.flatnonzero(wrong)
    places = places[np.argsort(-wrong.flat[places], kind="stable")][:_NUM_LISTED]
    lines = [
        f"{wrong.flat[place]:>5,} of {totals[place // number]:<6,}"
        f"{names[place // number]} as {names[place % number]}"
        for place in places.tolist()
    ]
    listed.axis("off")
    listed.set_title("most confused: target as predicted", loc="left", fontsize=10, color=FAINT)
    listed.text(
        0, 0.99, "\n".join(lines) or "nothing is confused", va="top", fontsize=8, color=INK,
        family="monospace", linespacing=1.7, transform=listed.transAxes,
    )  # fmt: skip
    return figure


def _label(axes: Any, which: str = "") -> None:
    axes.set_xlabel(f"predicted{which}", labelpad=8, color=FAINT)
    axes.set_ylabel(f"target{which}", labelpad=8, color=FAINT)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)


def _write_cells(axes: Any, confusion: npt.NDArray[Any], shares: npt.NDArray[Any]) -> None:
    for (row, column), count in np.ndenumerate(confusion):
        share = float(shares[row, column])
        of_row = percent(share) if confusion[row].any() else ""
        texts = ((f"{count:,}", 4, 10.0), (of_row, -9, 7.5))
        for text, points_up, size in texts:
            cell = axes.annotate(
                text, (column, row), (0, points_up), textcoords="offset points", fontsize=size,
                ha="center", va="center", color=INK if count else PALE,
            )  # fmt: skip
            cell.set_in_layout(False)  # within the axes; of 20 classes 2.9 s, now 1.9
