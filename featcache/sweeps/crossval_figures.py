"""The figures of a cross-validation: of each fold, their mean, and of all rows in one; as lines.

Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.errors import printable
from featcache.formatting import count, decimal, shorten
from featcache.metrics.scores import compute_metrics, paired_interval

if TYPE_CHECKING:
    from featcache.sweeps.crossval import CrossvalSummary

_WIDTH = 80
_MANY_CLASSES = 20  # more do not get a line each
_FIGURES = ("accuracy", "balanced_accuracy", "roc_auc")
_NUMBERS = ("num_samples", "num_positive", "num_negative", "num_unknown")


def measure_fold(
    targets: npt.NDArray[Any], probs: npt.NDArray[np.float64], classes: Sequence[str]
) -> dict[str, Any]:
    """Return the figures of a fold: see ``metrics.compute_metrics``, whose arguments these are."""
    found = compute_metrics(targets, probs, classes)
    kept = ("recall", "roc_auc", *_NUMBERS)
    return {name: found[name] for name in _FIGURES} | {
        "per_class": {
            name: {key: row[key] for key in kept if key in row}
            for name, row in found["per_class"].items()
        }
    }


def pool_figures(
    targets: npt.NDArray[Any], probs: npt.NDArray[np.float64], classes: Sequence[str]
) -> dict[str, Any]:
    """Return the rates of all rows in one.

    No area under a curve: it would rank scores of different heads against each other.
    """
    found = compute_metrics(targets, probs, classes)
    kept = ("recall", "confusion_matrix", *_NUMBERS)
    return {
        "num_rows": len(targets), "accuracy": found["accuracy"],
        "balanced_accuracy": found["balanced_accuracy"],
        "per_class": {
            name: {key: row[key] for key in kept if key in row}
            for name, row in found["per_class"].items()
        },
        "confusion_matrix": found["confusion_matrix"],
    }  # fmt: skip


def mean_figures(per_fold: Sequence[Mapping[str, Any]], ratio: float) -> dict[str, Any]:
    """Return the mean of each figure over the folds, with its interval.

    Args:
        per_fold: From ``measure_fold``.
        ratio: Rows judged by over rows trained on.
    """
    figures = {name: _mean([row[name] for row in per_fold], ratio) for name in _FIGURES}
    per_class = {
        name: {
            key: _mean([row["per_class"][name][key] for row in per_fold], ratio)
            for key in ("recall", "roc_auc")
        }
        for name in per_fold[0]["per_class"]
    }
    return figures | {"per_class": per_class}


def _mean(values: Sequence[float | None], ratio: float) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return {"mean": known[0] if known else None, "low": None, "high": None,
                "num_folds": len(known)}  # fmt: skip
    mean, low, high = paired_interval(known, ratio)
    if low == high:  # all alike: folds tell nothing of how far off they are
        return {"mean": mean, "low": None, "high": None, "num_folds": len(known)}
    return {
        "mean": mean, "low": max(low, 0.0), "high": min(high, 1.0), "num_folds": len(known)
    }  # fmt: skip


def crossval_lines(summary: CrossvalSummary) -> Iterator[str]:
    """Yield the figures as lines of up to 80 columns."""
    yield from _fold_lines(summary)
    number = len(summary.per_fold)
    yield f"mean of {number:,} folds (in brackets the 95 % interval of Nadeau and Bengio):"
    figures = {"accuracy": "accuracy", "balanced accuracy": "balanced_accuracy"}
    figures |= {"roc auc (mean of the classes)": "roc_auc"}
    for title, name in figures.items():
        if summary.mean[name]["mean"] is not None:
            yield f"  {title:<30}{_interval(summary.mean[name])}"
    yield from _class_lines(summary)
    yield from _matrix_lines(summary)
    yield (
        f"{count(number, 'head')} in {summary.seconds:.1f} s on {summary.device}, written to "
        f"{printable(summary.folder.as_posix())}"
    )


def _fold_lines(summary: CrossvalSummary) -> Iterator[str]:
    has_strength = "strength" in summary.per_fold[0]
    yield (
        f"{'repeat':>6}  {'fold':>4}  {'rows':>7}  {'strength' if has_strength else 'epoch':>8}"
        f"  {'accuracy':>8}  {'balanced':>8}  {'roc auc':>8}"
    )
    for row in summary.per_fold:
        chosen = f"{row['strength']:.2e}" if has_strength else str(row["best_epoch"])
        cells = "".join(f"  {_cell(row[name]):>8}" for name in _FIGURES)
        yield f"{row['repeat']:>6}  {row['fold']:>4}  {row['num_rows']:>7,}  {chosen:>8}{cells}"


def _class_lines(summary: CrossvalSummary) -> Iterator[str]:
    """Yield a line per class: its recall over the folds, and over all rows in one."""
    of_classes, pooled = summary.mean["per_class"], summary.pooled[0]["per_class"]
    names = list(summary.classes)
    if len(names) > _MANY_CLASSES:
        known = [name for name in names if of_classes[name]["recall"]["mean"] is not None]
        names = sorted(known, key=lambda name: of_classes[name]["recall"]["mean"])[:10]
        yield f"the {len(names)} of {len(summary.classes):,} classes with the lowest recall:"
    width = min(max(len("recall of class"), *(len(printable(n)) for n in names)), 28)
    again = " (repeat 1)" if summary.num_repeats > 1 else ""
    yield f"  {'recall of class':<{width}}  {'mean of folds':<22}  all rows, out of fold{again}"
    for name in names:
        row = pooled[name]
        total = row.get("num_samples", row.get("num_positive"))
        found = "none there"
        if total:
            found = f"{round(row['recall'] * total):,} of {total:,}: {decimal(row['recall'])}"
        shown = _interval(of_classes[name]["recall"])
        yield f"  {shorten(printable(name), width):<{width}}  {shown:<22}  {found}"


def _matrix_lines(summary: CrossvalSummary) -> Iterator[str]:
    """Yield the confusion matrix of all rows where it fits."""
    matrix = summary.pooled[0]["confusion_matrix"]
    if matrix is None:
        return
    names = [printable(name) for name in summary.classes]
    cells = [[f"{number:,}" for number in row] for row in matrix]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    corner = "target \\ pred"
    margin = max(map(len, [corner, *names]))
    if margin + sum(widths) + 2 * len(widths) > _WIDTH:
        return
    for first, row in zip([corner, *names], [names, *cells], strict=True):
        line = "".join(f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        yield f"{first:<{margin}}{line}"


def _interval(figure: Mapping[str, Any]) -> str:
    if figure["mean"] is None:
        return "undefined"
    if figure["low"] is None:
        return f"{decimal(figure['mean'])} (folds alike)"
    return f"{decimal(figure['mean'])} ({decimal(figure['low'])} to {decimal(figure['high'])})"


def _cell(value: float | None) -> str:
    return "-" if value is None else decimal(value)
