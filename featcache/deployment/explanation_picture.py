"""The picture of an explanation: the image, the map on it, and the occlusion on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.deployment.explanation_lines import name_of
from featcache.errors import printable
from featcache.evaluation.evidence import MIDDLE
from featcache.evaluation.figures import as_png
from featcache.formatting import percent, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT, _ALARM = "#1b2733", "#5f6b76", "#a40000"
_COLOURS = "RdBu_r"  # red speaks for, blue against; told apart by the colour-blind
_STRONGEST = 0.72  # opacity of the strongest cell
_FOOT = "What the network used, not where disease is. Not for diagnosis."


def draw_explanation(
    facts: Mapping[str, Any], pixels: Sequence[npt.NDArray[np.uint8]]
) -> bytes:  # fmt: skip
    """Return the picture of one explanation, a PNG; a row for each backbone.

    Args:
        facts: What ``Explanation.as_dict`` returns.
        pixels: What each backbone saw, (S, S) or (S, S, 3).
    """
    from matplotlib.figure import Figure

    maps = facts["maps"]
    figure = Figure((12.0, 3.6 * len(maps) + 0.8), dpi=110, layout="constrained")
    rows = figure.subplots(len(maps), 3, squeeze=False)
    for (image, of_map, of_occlusion), made, seen in zip(rows, maps, pixels, strict=True):
        _show(image, seen)
        title = "what the network sees"
        image.set_title(title if len(maps) == 1 else shorten(printable(made["backbone"]), 34),
                        fontsize=10, color=_FAINT)  # fmt: skip
        if made["map"] is None:
            of_map.axis("off")
            said = "no map: its features are not\nthe mean over positions"
            of_map.text(0.5, 0.5, said, ha="center", va="center", color=_FAINT)
        else:
            height, width = len(made["map"]), len(made["map"][0])
            title = f"map, {height} x {width}: adds to the log-odds"
            _overlay(figure, of_map, seen, np.array(made["map"]), title)
            low, high = (1 - MIDDLE) / 2, (1 + MIDDLE) / 2
            square = [low, high, high, low, low], [low, low, high, high, low]
            of_map.plot(*square, color=_INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
            of_map.set_xlabel(f"dashed: the middle {percent(MIDDLE**2)}", color=_FAINT)
        title = "occlusion: log-odds lost where blurred"
        _overlay(figure, of_occlusion, seen, np.array(made["occlusion"]), title)
        if made["rank_correlation"] is not None:
            said = f"rank correlation with the map {_signed(made['rank_correlation'])}"
            said += ": they disagree" * bool(made["disagree"])
            of_occlusion.set_xlabel(said, color=_ALARM if made["disagree"] else _FAINT)
    figure.suptitle(_title(facts), fontsize=12, color=_INK)
    figure.supxlabel(_FOOT, fontsize=9, color=_FAINT)
    return as_png(figure)


def _title(facts: Mapping[str, Any]) -> str:
    prob = dict(zip(facts["classes"], facts["probs"], strict=True))[facts["positive"]]
    against = "" if facts["against"] is None else f" against {name_of(facts['against'])}"
    name = shorten(printable(PurePath(facts["path"]).name), 50)
    unlike = "  (unlike any training image)" * bool(facts["unlike_training"])
    return (
        f"{name}: {name_of(facts['positive'])} {percent(prob, 1)}, "
        f"log-odds {_signed(facts['log_odds'], '+')}{against}{unlike}"
    )


def _signed(value: float, plus: str = "") -> str:
    """Return a number as the axes write theirs."""
    return f"{value:{plus}.2f}".replace("-", "\N{MINUS SIGN}")


def _show(axes: Axes, pixels: npt.NDArray[np.uint8]) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _overlay(
    figure: Figure, axes: Axes, pixels: npt.NDArray[np.uint8], plane: npt.NDArray[np.float64],
    title: str,
) -> None:  # fmt: skip
    """Draw the cells of a plane on an image: as they are, not smoothed into more than is known."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    grey = pixels if pixels.ndim == 2 else pixels.mean(axis=2)
    _show(axes, grey.astype(np.uint8))
    largest = float(np.abs(plane).max(initial=0)) or 1.0
    shades = ScalarMappable(Normalize(-largest, largest), _COLOURS)
    cells = shades.to_rgba(plane)
    cells[..., 3] = _STRONGEST * np.abs(plane) / largest
    axes.imshow(cells, interpolation="nearest", extent=(0, 1, 1, 0))
    axes.set_title(title, fontsize=10, color=_FAINT)
    bar = figure.colorbar(shades, ax=axes, fraction=0.046, pad=0.04, shrink=0.9)
    bar.ax.tick_params(labelsize=8, colors=_INK, length=2)
    bar.outline.set_visible(False)
    bar.ax.set_title("for", fontsize=8, color=_INK, loc="left")
    bar.ax.text(0, -0.02, "against", fontsize=8, color=_INK, va="top", transform=bar.ax.transAxes)
