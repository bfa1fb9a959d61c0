"""The plot of ``head.py``: what a head costs, and how its loss comes down meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import LogLocator, NullFormatter
from measuring import describe_machine, number

_COLOURS = {
    "featcache": "#1f6f5c",
    "DataLoader loop": "#b0413e",
    "tensor-indexed loop": "#5b7f95",
    "skorch": "#d98b4b",
    "MLPClassifier": "#8a8d91",
    "LogisticRegression": "#7b5c86",
}


def draw_head(path: Path, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Draw seconds as bars, and validation losses against the clock.

    Args:
        path: The picture.
        report: Of ``head.py``.
        rows: Those of its ways to draw.
    """
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
    _draw_seconds(left, rows)
    _draw_losses(right, rows, report["same_loss"])
    task = report["task"]
    left.set_title(
        f"one head, {task['num_rows']:,} rows, {task['epochs']} epochs", fontsize=10, loc="left"
    )
    right.set_title("validation loss, seed 0; colours as on the left", fontsize=10, loc="left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(describe_machine(report), fontsize=8, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_seconds(axis: Any, rows: list[dict[str, Any]]) -> None:
    ours = next((row["seconds"] for row in rows if row["way"] == "featcache"), None)
    highest = 0.0
    for place, row in enumerate(rows):
        axis.barh(place, row["seconds"], color=_COLOURS[row["way"]], height=0.62, zorder=2)
        raw = [sample["seconds"] for sample in row["samples"]]
        if len(raw) > 1:
            axis.plot(raw, [place] * len(raw), "|", color="black", markersize=9, zorder=3)
        text = f"{number(row['seconds'])} s"
        if ours is not None and row["way"] != "featcache":
            text += f"  ({number(row['seconds'] / ours, 2)} x featcache)"
        axis.annotate(
            text, (max(raw), place), xytext=(7, 0), textcoords="offset points", va="center",
            fontsize=9,
        )  # fmt: skip
        highest = max(highest, *raw)
    axis.set_yticks(range(len(rows)), [row["way"] for row in rows], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.5 * highest)
    axis.set_xlabel("seconds, validation after every epoch included")


def _draw_losses(axis: Any, rows: list[dict[str, Any]], same_loss: float | None) -> None:
    for row in rows:
        curve = row["samples"][0]["curve"]
        axis.plot(
            [point["seconds"] for point in curve], [point["valid_loss"] for point in curve],
            "o-", color=_COLOURS[row["way"]], markersize=3.5, linewidth=1.6,
        )  # fmt: skip
    if same_loss is not None:
        axis.axhline(same_loss, color="#555555", linewidth=1, linestyle="--", zorder=1)
        axis.annotate(
            "the same loss", (0, same_loss), xycoords=("axes fraction", "data"), xytext=(4, 3),
            textcoords="offset points", color="#555555", fontsize=8,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter(NullFormatter())
    axis.set_xlabel("seconds")
    axis.set_ylabel("cross-entropy")
