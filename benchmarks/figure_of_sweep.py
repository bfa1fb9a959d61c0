"""The plot of ``sweep.py``: heads a minute over the number of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator
from measuring import describe_machine

_COLOURS = ("#1f6f5c", "#5b7f95", "#b0413e", "#d98b4b", "#7b5c86")
_BOUND = "#555555"


def draw_sweep(path: Path, report: dict[str, Any], lines: dict[str, list[dict[str, Any]]]) -> None:
    """Draw a line per way, and the machine's bounds.

    Args:
        path: The picture.
        report: Of ``sweep.py``.
        lines: By way, featcache first, its points: ``num_heads``, ``heads_per_minute`` and
            ``samples`` of it, and whether all of it was measured.
    """
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
    ends: list[tuple[float, float, str, str]] = []
    for (name, points), colour in zip(lines.items(), _COLOURS, strict=False):
        places = [point["num_heads"] for point in points]
        rates = [point["heads_per_minute"] for point in points]
        width = 2.6 if name == "featcache" else 1.6
        axis.plot(places, rates, "-", color=colour, linewidth=width, zorder=3)
        for point in points:
            axis.plot(
                point["num_heads"], point["heads_per_minute"], "o", color=colour, markersize=6,
                markerfacecolor="white" if point["extrapolated"] else colour, zorder=4,
            )  # fmt: skip
            raw = point["samples"]
            if len(raw) > 1:
                axis.vlines(point["num_heads"], min(raw), max(raw), color=colour, zorder=2)
        ends.append((places[-1], rates[-1], name, colour))
    for name, style in (("one head", "--"), ("memory", ":")):
        counts = [table["num_heads"] for table in report["tables"]]
        rates = [table["bound"]["heads_per_minute"][name] for table in report["tables"]]
        axis.plot(counts, rates, style, color=_BOUND, linewidth=1.5, zorder=1)
        text = "bound, a head in cache" if name == "one head" else "bound, from memory"
        ends.append((counts[-1], rates[-1], text, _BOUND))
    axis.set_xscale("log")
    axis.set_yscale("log")
    _label_ends(axis, ends)
    counts = [table["num_heads"] for table in report["tables"]]
    axis.set_xlim(0.85 * counts[0], 1.12 * counts[-1])
    axis.xaxis.set_major_locator(FixedLocator(counts))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("heads (hollow: part measured, the rest at its rate)")
    task = report["task"]
    axis.set_ylabel("heads a minute")
    axis.set_title(
        f"heads of {task['epochs']} epochs over {task['num_rows']:,} x {task['num_features']:,} "
        f"features, batches of {task['batch_size']}", fontsize=10, loc="left",
    )  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(describe_machine(report), fontsize=8, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label_ends(axis: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name beside its end, none over another."""
    axis.margins(y=0.08)
    low, high = axis.get_ylim()
    gap = (high / low) ** 0.052  # a line of text
    place = 0.0
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        place = max(y, place * gap)
        axis.annotate(
            name, (x, y), xytext=(1.02, place), textcoords=axis.get_yaxis_transform(),
            color=colour, fontsize=9, va="center", annotation_clip=False,
        )  # fmt: skip
