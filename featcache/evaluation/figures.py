"""Pictures of results, drawn with Pillow.

Importing matplotlib and drawing with it took 0.8 of the 2.8 CPU seconds of ``featcache evaluate``;
this takes 0.1.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.errors import printable

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

_LONGEST_NAME = 22
_INK, _FAINT, _PALE = "#1b2733", "#5f6b76", "#9aa5af"
# The lighter half of ColorBrewer's Blues (Cynthia Brewer, colorbrewer2.org): one ink on all.
_SHADES = np.array(
    [(247, 251, 255), (222, 235, 247), (198, 219, 239), (158, 202, 225), (107, 174, 214)]
)

_MAX_CELLS = 40  # more classes: a picture of the same size, without numbers in it
_CELL, _MIN_SIDE, _GAP, _MARGIN = 118, 374, 4, 16  # in pixels
_TITLE, _TEXT, _SMALL = 22, 20, 15  # sizes of letters in pixels


def draw_confusion(confusion: npt.NDArray[Any], classes: Sequence[str], title: str) -> bytes:
    """Return a picture of a confusion matrix, a PNG.

    A cell shows its count and its share of the row, that is of the images with that target; the
    share also decides its shade, so a rare class is as visible as a frequent one.

    Args:
        confusion: (C, C) counts, rows = target.
        classes: C names. They are shown as text whatever they hold, control codes escaped.
        title: One line above the picture.
    """
    from PIL import Image, ImageDraw

    confusion = np.asarray(confusion)
    names = [_shorten(printable(name)) for name in classes]
    text, number = _font(_TEXT), len(names)
    cell = max(_CELL * min(number, _MAX_CELLS), _MIN_SIDE) / number
    edges = [round(i * cell) for i in range(number + 1)]
    longest = max(round(text.getlength(name)) for name in names)
    slanted = longest > cell - 8  # they do not fit side by side
    labels = [_label(name, text, slanted=slanted) for name in names]
    left = _MARGIN + 2 * _TEXT + longest + _MARGIN
    top = _MARGIN + 2 * _TITLE
    below = max(label.height for label in labels) + 3 * _TEXT + _MARGIN
    title = _shorten(printable(title), 60)
    # Names that lean to the left begin at the margin; the title may be wider than the cells.
    left = max(left, max(label.width for label in labels) if slanted else 0)
    width = max(left + edges[-1] + 2 * _MARGIN, round(_font(_TITLE).getlength(title)) + 2 * _MARGIN)
    picture = Image.new("RGB", (width, top + edges[-1] + below), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((width / 2, _MARGIN + _TITLE / 2), title, _INK, _font(_TITLE), "mm")
    middle = edges[-1] / 2
    bottom = top + edges[-1]
    draw.text((left + middle, picture.height - _MARGIN), "predicted", _FAINT, text, "ms")
    aside = _label("target", text, slanted=False, color=_FAINT).rotate(90, expand=True)
    picture.paste(aside, (_MARGIN, round(top + middle - aside.height / 2)), aside)
    step = max(1, round(1.2 * _TEXT / cell + 0.5))  # names that do not fit are left out
    for i in range(0, number, step):
        center = (edges[i] + edges[i + 1]) / 2
        draw.text((left - 8, top + center), names[i], _INK, text, "rm")
        x = left + center - (labels[i].width - 8 if slanted else labels[i].width / 2)
        picture.paste(labels[i], (round(x), bottom + 8), labels[i])
    _draw_cells(draw, confusion, (left, top), edges)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _draw_cells(
    draw: ImageDraw, confusion: npt.NDArray[Any], corner: tuple[int, int], edges: Sequence[int]
) -> None:
    """Draw the cells, and where there are few of them their numbers."""
    rows = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, rows, out=np.zeros(confusion.shape), where=rows > 0)
    at = np.linspace(0, 1, len(_SHADES))
    shades = np.stack([np.interp(shares, at, channel) for channel in _SHADES.T], -1)
    gap = min(_GAP, (edges[-1] // len(confusion)) // 8)
    font, small = _font(_TEXT), _font(_SMALL)
    for (row, column), count in np.ndenumerate(confusion):
        x, y = corner[0] + edges[column], corner[1] + edges[row]
        width, height = edges[column + 1] - edges[column], edges[row + 1] - edges[row]
        shade = tuple(shades[row, column].round().astype(int).tolist())
        draw.rectangle((x, y, x + width - gap - 1, y + height - gap - 1), shade)
        if len(confusion) > _MAX_CELLS:
            continue
        share, color = shares[row, column], _INK if count else _PALE
        percent = "<1%" if 0 < share < 0.005 else f"{share:.0%}"
        center, middle = x + (width - gap) / 2, y + (height - gap) / 2
        draw.text((center, middle - 8), f"{count:,}", color, font, "mm")
        if confusion[row].any():
            draw.text((center, middle + 18), percent, color, small, "mm")


def _label(name: str, font: FreeTypeFont, *, slanted: bool, color: str = _INK) -> Image:
    """Return a text as a picture with a clear background, turned to rise to the right or not."""
    from PIL import Image, ImageDraw

    size = (max(1, round(font.getlength(name))), round(1.4 * font.size))
    label = Image.new("RGBA", size, color + "00")
    ImageDraw.Draw(label).text((0, size[1] / 2), name, color, font, "lm")
    return label.rotate(35, Image.Resampling.BICUBIC, expand=True) if slanted else label


def _font(size: int) -> FreeTypeFont:
    """Return matplotlib's font, which has more scripts than Pillow's; else Pillow's."""
    from PIL import ImageFont

    found = importlib.util.find_spec("matplotlib")
    for folder in found.submodule_search_locations or () if found else ():
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        with contextlib.suppress(OSError):
            return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # where a size is given
    return font


def _shorten(text: str, longest: int = _LONGEST_NAME) -> str:
    """Cut out the middle of a long text: names often differ at both ends."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[head + 1 - longest :]}"
