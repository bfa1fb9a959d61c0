"""The plot of ``extract.py``: what was reached, against what decoding and the network allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from measuring import number

_COLOURS = {"featcache": "#1f6f5c", "stock": "#5b7f95", "thingsvision": "#d98b4b"}
_BOUND = "#b0413e"


def draw_bounds(path: Path, part: dict[str, Any], machine: str) -> None:
    """Draw one panel per job: the ways as bars, the bound as a line.

    Args:
        path: The picture.
        part: What ``measure_pipeline`` yields.
        machine: One line about the machine.
    """
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    jobs = part["jobs"]
    figure, panels = plt.subplots(
        len(jobs), 1, figsize=(8.5, 0.7 + 1.75 * len(jobs)), layout="constrained", squeeze=False
    )
    for panel, job in zip(panels[:, 0], jobs, strict=True):
        _draw_job(panel, job)
    panels[-1, 0].set_xlabel("images a second, once running")
    figure.suptitle(machine, fontsize=8, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_job(panel: Any, job: dict[str, Any]) -> None:
    rows = [row for row in job["rows"] if "reason" not in row]
    limit = 1.45 * max([job["bound"], *(row["images_per_second"] for row in rows)])
    for place, row in enumerate(rows):
        rate = row["images_per_second"]
        colour = next(c for name, c in _COLOURS.items() if row["way"].startswith(name))
        panel.barh(place, rate, color=colour, height=0.6, zorder=2)
        raw = row["samples_images_per_second"]
        if len(raw) > 1:
            panel.plot(raw, [place] * len(raw), "|", color="black", markersize=8, zorder=3)
        text = f"{number(rate)}  ({100 * row['share_of_bound']:.0f} % of the bound)"
        panel.annotate(
            text, (max([rate, *raw]), place), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=9, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    panel.axvline(job["bound"], color=_BOUND, linewidth=1.5, linestyle="--", zorder=1)
    panel.annotate(
        f"bound {number(job['bound'])}",
        (job["bound"], len(rows) - 0.55), xytext=(4, 0), textcoords="offset points",
        color=_BOUND, fontsize=9, va="center",
    )  # fmt: skip
    names = [row["way"].split(":")[0] for row in rows]
    panel.set_yticks(range(len(rows)), names, fontsize=9)
    panel.set_ylim(len(rows) - 0.3, -0.5)
    panel.set_xlim(0, limit)
    kind = job["kind"].replace("jpeg-", "JPEG ").replace("png-grey-", "grey PNG ")
    title = f"{job['num_images']:,} x {kind}, {job['precision']}"
    panel.set_title(title, fontsize=10, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
