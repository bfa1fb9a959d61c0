"""The 95 % intervals of an evaluation, which respect groups where there are any.

Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.evaluation.predicted_rows import PredictedRows
from featcache.metrics.areas import auc_interval
from featcache.metrics.rates import (
    Interval,
    count_groups,
    grouped_rate_interval,
    mean_rate_interval,
)

WILSON = "Wilson"
OF_GROUPS = "Clopper and Pearson, effective sample size of the groups (Korn and Graubard)"
BOTH = f"{OF_GROUPS}; Wilson for rates of rows of which no two share a group"

FEW_IMAGES = 100
"""With a class of fewer images, no two of one group, the text warns: Wilson's interval holds on
average only. By the binomial distribution, for true recalls of 0.8, 0.9, 0.95 and 0.98: with 100 of
each class the intervals of recalls and of their mean hold in 93.6 to 96.6 % of the cases; with 75
in 92.0 % at worst, with 20 in 88.0 %. Those of groups are wider: 94 % at worst of 40 images."""

_Mask = npt.NDArray[np.bool_]


def measure_intervals(rows: PredictedRows, positive: str | None) -> dict[str, Any]:
    """Return what ``Evaluation.intervals`` says.

    Args:
        rows: With their predictions.
        positive: The class that is looked for, or None.
    """
    has_groups = any(rows.groups)
    facts: dict[str, Any] = {
        "confidence": 0.95,
        "num_groups": count_groups(rows.groups) if has_groups else None,
        "num_ungrouped": rows.groups.count("") if has_groups else None,
    }  # fmt: skip
    targets, preds = rows.targets, rows.preds
    if rows.has_labels:
        members = [np.flatnonzero(targets[:, i] == 1) for i in range(len(rows.classes))]
        recalls = [_interval_of(rows, which, preds[:, i]) for i, which in enumerate(members)]
        facts |= {"accuracy": None, "balanced_accuracy": None}
    else:
        right, order = preds == targets, np.argsort(targets, kind="stable")
        ends = np.searchsorted(targets[order], np.arange(1, len(rows.classes)))
        members = np.split(order, ends)
        recalls = [_interval_of(rows, which, right) for which in members]
        known = [
            (float(right[which].mean()), interval)
            for which, interval in zip(members, recalls, strict=True) if interval is not None
        ]  # fmt: skip
        rates, intervals = zip(*known, strict=True)
        facts["accuracy"] = _interval(rows, np.ones(len(targets), bool), right)
        facts["balanced_accuracy"] = list(mean_rate_interval(rates, intervals))
    of_class = dict(zip(rows.classes, recalls, strict=True))
    facts |= {"method": _method(rows, members), "few": _find_few(rows, members)}
    facts |= {"sensitivity": None, "specificity": None, "positive_roc_auc": None}
    is_pair = not rows.has_labels and len(rows.classes) == 2  # both areas are the same
    facts["roc_auc"] = _listed(area_interval(rows, 1)) if is_pair else None
    if positive is not None:
        index = rows.classes.index(positive)
        of_others = targets[:, index] == 0 if rows.has_labels else targets != index
        says_no = ~preds[:, index] if rows.has_labels else preds != index
        facts["sensitivity"] = of_class[positive]
        facts["specificity"] = _interval(rows, of_others, says_no)
        facts["positive_roc_auc"] = _listed(area_interval(rows, index))
    return facts | {"per_class": {name: {"recall": value} for name, value in of_class.items()}}


def _method(rows: PredictedRows, members: Sequence[npt.NDArray[np.int64]]) -> str:
    """Return how the intervals of the rates are made: of all rows and of each class."""
    if not _has_shared(rows, np.arange(len(rows.groups))):
        return WILSON
    of_class = [_has_shared(rows, which) for which in members if len(which)]
    return OF_GROUPS if all(of_class) else BOTH


def _has_shared(rows: PredictedRows, which: npt.NDArray[np.int64]) -> bool:
    return count_groups([rows.groups[row] for row in which.tolist()]) < len(which)


def _find_few(rows: PredictedRows, members: Sequence[npt.NDArray[np.int64]]) -> Any:
    """Return the class with the fewest images, and how many, if they are few; else None."""
    numbers = {
        name: len(which) for name, which in zip(rows.classes, members, strict=True)
        if len(which) and not _has_shared(rows, which)
    }  # fmt: skip
    fewest = min(numbers, key=lambda name: numbers[name], default=None)
    if fewest is None or numbers[fewest] >= FEW_IMAGES:
        return None
    return {"class": fewest, "num_samples": numbers[fewest]}


def area_interval(rows: PredictedRows, index: int) -> Interval | None:
    """Return the interval of the ROC AUC of a class against the rest; None without both sides."""
    is_yes, scores, groups = class_answers(rows, index)
    if not is_yes.any() or is_yes.all():
        return None
    return auc_interval(is_yes, scores, groups=groups)


def class_answers(
    rows: PredictedRows, index: int
) -> tuple[_Mask, npt.NDArray[np.float64], list[str]]:
    """Return which rows are of a class, its probabilities and the groups, of known rows."""
    if not rows.has_labels:
        return rows.targets == index, rows.probs[:, index], rows.groups
    known = np.flatnonzero(~np.isnan(rows.targets[:, index]))
    groups = [rows.groups[row] for row in known.tolist()]
    return rows.targets[known, index] == 1, rows.probs[known, index], groups


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _interval(rows: PredictedRows, counts: _Mask, is_hit: _Mask) -> list[float] | None:
    """Return the interval of the share of hits among the rows that count."""
    return _interval_of(rows, np.flatnonzero(counts), is_hit)


def _interval_of(
    rows: PredictedRows, which: npt.NDArray[np.int64], is_hit: _Mask
) -> list[float] | None:
    if not len(which):
        return None
    groups = [rows.groups[row] for row in which.tolist()]
    return list(grouped_rate_interval(is_hit[which], groups))
