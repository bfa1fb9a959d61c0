"""Draw README's picture, ``.github/featcache.svg``: python scripts/readme_figure.py [FILE].

Transparent, in tones that read on white and on dark pages. The X-rays in it are phantoms.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from featcache.cli.phantoms import make_phantoms

BLUE, GREEN, ORANGE, GREY = "#3b6ea5", "#2f8f6b", "#c9772b", "#7a8694"
TEXT_ON_COLOUR = "white"


def main() -> None:
    """Draw the picture."""
    default = Path(__file__).resolve().parent.parent / ".github" / "featcache.svg"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    mpl.rcParams["svg.hashsalt"] = "featcache"  # the same file from the same script
    mpl.rcParams["svg.fonttype"] = "path"
    figure = Figure(figsize=(10, 3.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(0, 33), aspect="equal")
    axes.axis("off")

    draw_images(axes)
    draw_arrow(axes, (19.5, 18), (24.5, 18))
    draw_backbone(axes)
    draw_arrow(axes, (41.5, 18), (46.5, 18))
    draw_cache(axes)
    draw_heads(axes)
    draw_results(axes)
    for x, title in ((9.5, "X-rays"), (33, "frozen backbone"), (53, "cache.h5"), (73, "heads")):
        write(axes, x, 30.6, title, size=11.5, weight="bold")
    for x, note in (
        (9.5, "grey, RGB, 16-bit, JPEG, PNG"),
        (33, "every image once"),
        (53, "features, read at disk speed"),
        (73, "seconds each, no image read"),
        (91.5, "a model to deploy"),
    ):
        write(axes, x, 3.2, note, size=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, transparent=True, metadata=metadata)
    print(path)


def write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    colour: str = GREY,
    weight: str = "normal",
) -> None:
    """Write a centred text."""
    axes.text(x, y, text, size=size, color=colour, weight=weight, ha="center", va="center")


def draw_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0
) -> None:
    """Draw an arrow, bent by an arc of that share of its length."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, linewidth=1.6, color=GREY,
            shrinkA=0, shrinkB=0, connectionstyle=f"arc3,rad={bend}",
        )
    )  # fmt: skip


def draw_box(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], colour: str
) -> None:
    """Draw a filled box with round corners, from its lower left one."""
    style = "round,pad=0,rounding_size=1.1"
    box = FancyBboxPatch(corner, *size, boxstyle=style, facecolor=colour, edgecolor="none")
    axes.add_patch(box)


def draw_images(axes: Axes) -> None:
    """Draw a fan of three phantoms."""
    with tempfile.TemporaryDirectory() as name:
        make_phantoms(Path(name), num_per_class=12, seed=3)
        files = [p for p in sorted(Path(name).rglob("*")) if p.suffix == ".jpg"][:3]
        pictures = [Image.open(file).convert("L").resize((140, 140)) for file in files]
    for step, picture in enumerate(pictures):
        left, bottom = 1.5 + 2.4 * step, 12.2 - 2.4 * step
        extent = (left, left + 12.2, bottom, bottom + 12.2)
        axes.imshow(
            np.asarray(picture), extent=extent, cmap="gray", interpolation="none", zorder=2 + step
        )
        frame = Rectangle((left, bottom), 12.2, 12.2, fill=False, linewidth=1.6, edgecolor=GREY)
        frame.set_zorder(2 + step)
        axes.add_patch(frame)
    axes.set(xlim=(0, 100), ylim=(0, 33))


def draw_backbone(axes: Axes) -> None:
    """Draw the network as shrinking layers, and a snowflake."""
    for step, height in enumerate((19, 16, 13, 10, 7.5)):
        draw_box(axes, (25.8 + 3 * step, 18 - height / 2), (2.3, height), BLUE)
    centre, reach = np.array((38.8, 10.0)), 1.9
    for angle in np.deg2rad(np.arange(90, 450, 60)):
        along = np.array((np.cos(angle), np.sin(angle)))
        tip = centre + reach * along
        axes.plot(*np.transpose((centre, tip)), color=BLUE, linewidth=1.5, solid_capstyle="round")
        for turn in (-0.8, 0.8):
            twig = np.array((np.cos(angle + turn), np.sin(angle + turn)))
            start = centre + 0.55 * reach * along
            line = np.transpose((start, start + 0.45 * reach * twig))
            axes.plot(*line, color=BLUE, linewidth=1.2, solid_capstyle="round")


def draw_cache(axes: Axes) -> None:
    """Draw the cache as a drum of rows."""
    left, right, top, bottom = 47.8, 58.2, 24.5, 11.5
    middle, width = (left + right) / 2, right - left
    axes.add_patch(Rectangle((left, bottom), width, top - bottom, color=GREEN, linewidth=0))
    axes.add_patch(Ellipse((middle, bottom), width, 3.6, color=GREEN, linewidth=0))
    axes.add_patch(Ellipse((middle, top), width, 3.6, facecolor="#55ad8b", linewidth=0))
    write(axes, middle, 17.6, "N x 1280", size=11, colour=TEXT_ON_COLOUR, weight="bold")
    write(axes, middle, 14.2, "paths, patients,\nhashes", size=7.5, colour=TEXT_ON_COLOUR)


def draw_heads(axes: Axes) -> None:
    """Draw a few heads that all read the cache."""
    names = ("linear", "512-128", "512-128, balanced", "1024, dropout 0.5")
    for row, name in enumerate(names):
        y = 24.6 - 4.4 * row
        draw_arrow(axes, (59.2, 18), (64.8, y), bend=0.10 * (row - 1.5))
        draw_box(axes, (65.2, y - 1.6), (15.6, 3.2), ORANGE)
        write(axes, 73, y - 0.1, name, size=8.5, colour=TEXT_ON_COLOUR, weight="bold")
    for step in range(3):
        axes.add_patch(Circle((72 + step, 8.2), 0.25, color=ORANGE))


def draw_results(axes: Axes) -> None:
    """Draw what comes out of a head."""
    for y, name in ((23, "evaluate"), (18, "predict"), (13, "export .pt")):
        draw_arrow(axes, (81.2, 18), (85.4, y))
        draw_box(axes, (85.8, y - 1.7), (11.6, 3.4), GREY)
        write(axes, 91.6, y - 0.1, name, size=9, colour=TEXT_ON_COLOUR, weight="bold")


if __name__ == "__main__":
    main()
