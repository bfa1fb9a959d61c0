"""What the samples of ``end_to_end.py`` amount to: medians, a table, a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from measuring import QUIET_LOAD

WAYS = {
    "a": "tutorial, live every epoch",
    "b": "the same, tuned by hand",
    "c": "live, featcache's decoder and engine",
    "d": "twenty-line cache",
    "e": "featcache",
}


def summarise(
    samples: dict[str, list[dict[str, Any]]], num_images: dict[str, int]
) -> dict[str, Any]:
    """Return medians, ratios, break-even epochs and rates."""
    seconds = {way: statistics.median(s["seconds"] for s in runs) for way, runs in samples.items()}
    epoch = {
        way: statistics.median(t for s in runs for t in s["epoch_seconds"])
        for way, runs in samples.items()
    }
    epochs = len(next(iter(samples.values()))[0]["epoch_seconds"])
    num_passes = epochs * (num_images["train"] + num_images["valid"]) + num_images["test"]
    result: dict[str, Any] = {
        "seconds": seconds,
        "epoch_seconds": epoch,
        "accuracy": {
            w: statistics.mean(s["accuracy"] for s in runs) for w, runs in samples.items()
        },
        "images_per_second": {
            way: (num_passes if way in "abc" else sum(num_images.values())) / seconds[way]
            for way in samples
        },
    }
    if "e" in samples:
        result["ratio_to_e"] = {way: seconds[way] / seconds["e"] for way in samples}
        result["break_even_epoch"] = {
            way: find_break_even(seconds, epoch, epochs, way) for way in "abc" if way in samples
        }
        for key in ("extract_seconds", "train_seconds", "evaluate_seconds", "further_head_seconds"):
            result[key] = statistics.median(s[key] for s in samples["e"])
        result["further_head_in_process_seconds"] = statistics.median(
            t for s in samples["e"] for t in s["further_head_in_process_seconds"]
        )
        if "a" in samples:
            for key in ("further_head_seconds", "further_head_in_process_seconds"):
                result[key.replace("seconds", "share_of_a")] = result[key] / seconds["a"]
    return result


def find_break_even(
    seconds: dict[str, float], epoch: dict[str, float], epochs: int, way: str
) -> int | None:
    """Return the fewest epochs for which (e) is cheaper than ``way``, None if 1,000 are too few."""
    for n in range(1, 1001):
        theirs, ours = (seconds[w] - (epochs - n) * epoch[w] for w in (way, "e"))
        if ours < theirs:
            return n
    return None


def describe(backbone: str, report: dict[str, Any]) -> str:
    """Return the Markdown table of one backbone."""
    summary, facts = report["summary"], report["environment"]
    counts = ", ".join(f"{n} {name}" for name, n in report["num_images"].items())
    machine = f"{facts['processor']}, {facts['num_cores']} cores, device {facts['device']}, torch "
    machine += facts["versions"]["torch"]
    lines = [
        f"### {backbone}, {report['epochs']} epochs, medians of {report['rounds']} rounds",
        "",
        f"{machine}; images: {counts}.",
        "",
        "| way | seconds | times (e) | images/s | test accuracy |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, seconds in summary["seconds"].items():
        ratio = summary.get("ratio_to_e", {}).get(way, float("nan"))
        lines.append(
            f"| ({way}) {WAYS[way]} | {seconds:.1f} | {ratio:.1f} | "
            f"{summary['images_per_second'][way]:.1f} | {summary['accuracy'][way]:.3f} |"
        )
    if "ratio_to_e" in summary:
        lines.append("")
        lines.append(
            f"Extract {summary['extract_seconds']:.1f} s, train {summary['train_seconds']:.1f} s, "
            f"evaluate {summary['evaluate_seconds']:.1f} s. A further head costs "
            f"{summary['further_head_seconds']:.1f} s as a new process, "
            f"{summary['further_head_in_process_seconds']:.2f} s in a running one."
        )
        for way, epochs in summary["break_even_epoch"].items():
            count = "over 1000" if epochs is None else f"{epochs} or more"
            lines.append(f"(e) is cheaper than ({way}) for {count} epochs.")
    if report["largest_feature_difference"] is not None:
        lines.append(
            f"Features of (d) and (e) agree to {report['largest_feature_difference']:.1e} "
            f"(relative L2, the worst image)."
        )
    if report["load_before"] > QUIET_LOAD:
        lines.append(f"The machine was not quiet: load {report['load_before']:.1f} at the start.")
    return "\n".join(lines) + "\n"


def draw(path: Path, backbone: str, report: dict[str, Any]) -> None:
    """Draw the ways' wall times, and their cost against the number of epochs."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    summary, samples = report["summary"], report["samples"]
    colours = dict(zip(WAYS, ("#b0413e", "#d98b4b", "#8a8d91", "#5b7f95", "#1f6f5c"), strict=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for row, (way, seconds) in enumerate(summary["seconds"].items()):
        left.barh(row, seconds, color=colours[way], height=0.62)
        raw = [sample["seconds"] for sample in samples[way]]
        left.plot(raw, [row] * len(raw), "|", color="black", markersize=9)
        ratio = summary.get("ratio_to_e", {}).get(way)
        text = f" {seconds:.0f} s" + (f"  ({ratio:.1f} x e)" if ratio and way != "e" else "")
        left.text(max(raw), row, "  " + text, va="center", fontsize=9)
    left.set_yticks(range(len(samples)), [f"({way}) {WAYS[way]}" for way in samples], fontsize=9)
    left.invert_yaxis()
    left.set_xlim(right=1.4 * max(s["seconds"] for runs in samples.values() for s in runs))
    left.set_xlabel("seconds of wall clock, cold process")
    left.set_title(f"{backbone}, {report['epochs']} epochs, {report['rounds']} rounds", fontsize=10)
    epochs = np.arange(1, 3 * report["epochs"] + 1)
    for way, seconds in summary["seconds"].items():
        line = seconds + (epochs - report["epochs"]) * summary["epoch_seconds"][way]
        right.plot(epochs, line, color=colours[way], label=f"({way})", linewidth=2)
    right.set_title("cost by epochs, from measured start and epoch times", fontsize=10)
    right.set_xlabel("epochs")
    right.set_ylabel("seconds")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=9, loc="upper left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
