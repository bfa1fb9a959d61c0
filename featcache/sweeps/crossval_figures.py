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
from featcache.metrics.rates import count_groups, grouped_rate_interval, mean_rate_interval
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
    targets: npt.NDArray[Any], probs: npt.NDArray[np.float64], classes: Sequence[str],
    groups: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Return the rates of all rows in one, with their 95 % intervals.

    No area under a curve: it would rank scores of different heads against each other.

    Args:
        targets: As for ``metrics.compute_metrics``, as are the next two.
        probs: Out of fold.
        classes: Names.
        groups: Of each row, empty where it has none.
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
        "intervals": _pooled_intervals(targets, probs, classes, groups),
    }  # fmt: skip


def _pooled_intervals(
    targets: npt.NDArray[Any], probs: npt.NDArray[np.float64], classes: Sequence[str],
    groups: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Return the intervals of pooled rates, by groups where there are any (keys: README.md)."""
    has_labels = targets.ndim == 2

    def interval(counts: npt.NDArray[np.bool_], is_hit: npt.NDArray[np.bool_]) -> Any:
        which = np.flatnonzero(counts)
        if not len(which):
            return None
        return list(grouped_rate_interval(is_hit[which], [groups[i] for i in which.tolist()]))

    preds: npt.NDArray[Any] = probs > 0.5 if has_labels else probs.argmax(axis=1)
    of_class = {
        name: interval(targets[:, i] == 1, preds[:, i])
        if has_labels
        else interval(targets == i, preds == i)
        for i, name in enumerate(classes)
    }
    facts: dict[str, Any] = {
        "confidence": 0.95, "num_groups": count_groups(groups) if any(groups) else None,
        "accuracy": None, "balanced_accuracy": None,
        "per_class": {name: {"recall": found} for name, found in of_class.items()},
    }  # fmt: skip
    if not has_labels:
        right = preds == targets
        rates = [float(right[targets == i].mean()) for i in range(len(classes))]
        facts["accuracy"] = interval(np.ones(len(targets), bool), right)
        facts["balanced_accuracy"] = list(mean_rate_interval(rates, [*of_class.values()]))
    return facts


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
    yield from _table_lines(summary)
    yield from _explanation(summary)
    yield from _matrix_lines(summary)
    yield (
        f"{count(number, 'head')} in {summary.seconds:.1f} s on {summary.device}, written to "
        f"{printable(summary.folder.as_posix())}"
    )
    if summary.ensemble is not None:
        yield f"their mean, a run like any other: {printable(summary.ensemble.as_posix())}"


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


def _table_lines(summary: CrossvalSummary) -> Iterator[str]:
    """Yield a line per figure: its mean over the folds, and that of all rows in one."""
    pooled = summary.pooled[0]
    intervals = pooled["intervals"]
    rows = [("", "mean of folds", "all rows, out of fold" + (" (repeat 1)" * _repeats(summary)))]
    for name in _FIGURES:
        if summary.mean[name]["mean"] is not None:
            found = "not pooled"
            if name != "roc_auc":
                found = _pooled(pooled[name], intervals[name])
            rows.append((name.replace("_", " "), interval_text(summary.mean[name]), found))
    of_classes, names = summary.mean["per_class"], list(summary.classes)
    if len(names) > _MANY_CLASSES:
        known = [name for name in names if of_classes[name]["recall"]["mean"] is not None]
        names = sorted(known, key=lambda name: of_classes[name]["recall"]["mean"])[:10]
    for name in names:
        row = pooled["per_class"][name]
        total = row.get("num_samples", row.get("num_positive"))
        found = "none there"
        if total:
            rate = _pooled(row["recall"], intervals["per_class"][name]["recall"])
            found = f"{rate}, {round(row['recall'] * total):,} of {total:,}"
        rows.append(
            (f"recall of {printable(name)}", interval_text(of_classes[name]["recall"]), found)
        )
    last = max(len(found) for _, _, found in rows)
    width = min(max(len(title) for title, _, _ in rows), max(_WIDTH - last - 28, 14))
    for title, mean, found in rows:
        yield f"  {shorten(title, width):<{width}}  {mean:<22}  {found}".rstrip()
    if len(names) < len(summary.classes):
        yield f"  ({len(names)} of {len(summary.classes):,} classes, those with the lowest recall)"


def _repeats(summary: CrossvalSummary) -> bool:
    return summary.num_repeats > 1


def _explanation(summary: CrossvalSummary) -> Iterator[str]:
    """Yield which of the intervals is which."""
    number = summary.pooled[0]["intervals"]["num_groups"]
    groups = "" if number is None else f" ({count(number, 'group')})"
    yield "95 % intervals in brackets: on the left (Nadeau and Bengio) for heads trained on"
    yield f"other rows; on the right{groups} for these heads on other images"


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


def interval_text(figure: Mapping[str, Any]) -> str:
    """Return a mean over folds with its interval: see ``mean_figures``."""
    if figure["mean"] is None:
        return "undefined"
    if figure["low"] is None:
        return f"{decimal(figure['mean'])} (folds alike)"
    return f"{decimal(figure['mean'])} ({decimal(figure['low'])} to {decimal(figure['high'])})"


def _pooled(rate: float, interval: Sequence[float] | None) -> str:
    if interval is None:
        return decimal(rate)
    return f"{decimal(rate)} ({decimal(interval[0])} to {decimal(interval[1])})"


def _cell(value: float | None) -> str:
    return "-" if value is None else decimal(value)
