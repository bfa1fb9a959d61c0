"""Pictures of results, drawn without a screen and without matplotlib's global state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import printable

_LONGEST_NAME = 22
_INK, _FAINT, _PALE = "#1b2733", "#5f6b76", "#9aa5af"

_MAX_CELLS = 40  # more classes: a picture of the same size, without numbers in it


def draw_confusion(confusion: npt.NDArray[Any], classes: Sequence[str], title: str) -> bytes:
    """Return a picture of a confusion matrix, a PNG.

    A cell shows its count and its share of the row, that is of the images with that target; the
    share also decides its shade, so a rare class is as visible as a frequent one.

    Args:
        confusion: (C, C) counts, rows = target.
        classes: C names. They are shown as text whatever they hold: no formula, no control code.
        title: One line above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    confusion = np.asarray(confusion)
    rows = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, rows, out=np.zeros(confusion.shape), where=rows > 0)
    names = [_shorten(printable(name)) for name in classes]
    longest = max(len(name) for name in names)
    side = min(max(0.82 * len(names), 2.6), 0.82 * _MAX_CELLS)
    slanted = longest > 9  # more do not fit side by side
    size = (side + 1.3 + 0.085 * longest, side + 1.5)
    figure = Figure(size, dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.9)  # stays light: one ink on all
    axes.set_xticks(
        range(len(names)), names, rotation=35 if slanted else 0,
        ha="right" if slanted else "center", rotation_mode="anchor",
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted", labelpad=8, color=_FAINT)
    axes.set_ylabel("target", labelpad=8, color=_FAINT)
    figure.suptitle(_shorten(printable(title), 60), fontsize=11, color=_INK)
    axes.tick_params(length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(1, len(names)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(names)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    if len(names) <= _MAX_CELLS:
        _write_cells(axes, confusion, shares)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a class may be called "$\\frac"
        text.set_usetex(False)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # Names in scripts the font lacks are drawn as boxes: no reason to stop or to complain.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _write_cells(axes: Any, confusion: npt.NDArray[Any], shares: npt.NDArray[Any]) -> None:
    for (row, column), count in np.ndenumerate(confusion):
        share = shares[row, column]
        percent = "<1%" if 0 < share < 0.005 else f"{share:.0%}"
        texts = ((f"{count:,}", 4, 10.0), (percent if confusion[row].any() else "", -9, 7.5))
        for text, points_up, size in texts:
            axes.annotate(
                text, (column, row), (0, points_up), textcoords="offset points", fontsize=size,
                ha="center", va="center", color=_INK if count else _PALE,
            )  # fmt: skip


def _shorten(text: str, longest: int = _LONGEST_NAME) -> str:
    """Cut out the middle of a long text: names often differ at both ends."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[head + 1 - longest :]}"
