"""Pictures of their size and resolution in which nothing is drawn, a quarter of a second faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_blank(figure: Figure, file: Any, **_: object) -> None:
    """Stand for ``Figure.savefig``."""
    size = [round(side * figure.dpi) for side in figure.get_size_inches()]
    Image.new("L", size).save(file, "PNG", dpi=(figure.dpi, figure.dpi))
