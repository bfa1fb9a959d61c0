"""ROC curves and reliability of the classes of a split, as they are drawn.

Reads and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache.evaluation.deciding.decision_file import Decisions
from featcache.evaluation.intervals import area_interval, class_answers
from featcache.evaluation.predicted_rows import PredictedRows
from featcache.metrics.areas import roc_auc, roc_curve
from featcache.metrics.calibration import calibration_error, reliability_table
from featcache.metrics.rates import Interval, grouped_rate_interval

MAX_NAMED = 6
"""Curves with a name and an interval; of more classes, the others are a pale background."""


@dataclass(frozen=True)
class Chosen:
    """What the threshold of a class does to these rows."""

    threshold: float
    false_alarms: float
    recall: float


@dataclass(frozen=True)
class RocCurve:
    """The curve of a class against the rest.

    Attributes:
        name: The class.
        false_alarms: Share of the rest that is called it, corner by corner.
        recalls: Share of the class that is found.
        auc: The area below.
        interval: Its 95 % interval; None where it has no name in the picture.
        num_yes: Rows of the class.
        chosen: Of its threshold; None where there is none.
    """

    name: str
    false_alarms: npt.NDArray[np.float64]
    recalls: npt.NDArray[np.float64]
    auc: float
    interval: Interval | None
    num_yes: int
    chosen: Chosen | None


@dataclass(frozen=True)
class ReliabilityPoint:
    """Rows of similar probability: how often they are what it is the probability of."""

    low: float
    high: float
    num_samples: int
    mean_prob: float
    share: float
    interval: Interval


@dataclass(frozen=True)
class Reliability:
    """Whether a probability is what it says.

    Attributes:
        name: The class; None: the most probable one, whichever it is, or any of several labels.
        points: Of the bins that have rows.
        error: The expected calibration error of this probability.
        num_samples: Rows; with several labels and no class, known labels.
    """

    name: str | None
    points: tuple[ReliabilityPoint, ...]
    error: float
    num_samples: int


def roc_curves(
    rows: PredictedRows, positive: str | None, decisions: Decisions | None
) -> list[RocCurve]:
    """Return the curves of all classes that have rows on both sides, each against the rest.

    Of two classes with a threshold, or a class that is looked for, that one alone: the other is its
    mirror image. Those classes come first; of more than ``MAX_NAMED``, the lowest areas follow.
    """
    wanted = _first_classes(positive, decisions)
    is_pair = not rows.has_labels and len(rows.classes) == 2
    columns = [rows.classes.index(name) for name in wanted[:1]] if is_pair else []
    areas = dict[int, float]()
    for column in columns or range(len(rows.classes)):
        is_yes, scores, _ = class_answers(rows, column)
        if is_yes.any() and not is_yes.all():
            areas[column] = roc_auc(is_yes, scores)
    is_long = len(areas) > MAX_NAMED
    order = sorted(
        areas,
        key=lambda i: (
            rows.classes[i] not in wanted[:MAX_NAMED], areas[i] if is_long else 0, i
        ),
    )  # fmt: skip
    return [
        _roc_curve(rows, column, areas[column], decisions, is_named=place < MAX_NAMED)
        for place, column in enumerate(order)
    ]


def _first_classes(positive: str | None, decisions: Decisions | None) -> list[str]:
    decided = [] if decisions is None else list(decisions.rules)
    return [positive, *(n for n in decided if n != positive)] if positive else decided


def _roc_curve(
    rows: PredictedRows, column: int, area: float, decisions: Decisions | None, *, is_named: bool
) -> RocCurve:
    name, chosen = rows.classes[column], None
    is_yes, scores, _ = class_answers(rows, column)
    if decisions is not None and name in decisions.rules:
        threshold = float(decisions.rules[name]["threshold"])
        called = scores >= threshold
        chosen = Chosen(threshold, float(called[~is_yes].mean()), float(called[is_yes].mean()))
    false_alarms, recalls = roc_curve(is_yes, scores)
    interval = area_interval(rows, column) if is_named else None
    return RocCurve(name, false_alarms, recalls, area, interval, int(is_yes.sum()), chosen)


def measure_reliability(
    rows: PredictedRows, positive: str | None, decisions: Decisions | None
) -> Reliability:
    """Return how often rows are what they are given a probability for.

    Of the class that is looked for, else of that with a threshold, else of the most probable class
    of each row; with several labels a row, of all known labels together.
    """
    name = next(iter(_first_classes(positive, decisions)), None)
    if name is not None:
        is_yes, probs, groups = class_answers(rows, rows.classes.index(name))
        if not len(is_yes):
            name = None
    if name is None:
        is_yes, probs, groups = _all_answers(rows)
    points = []
    for row in reliability_table(is_yes, probs):
        if row.mean_prob is None or row.share_of_yes is None:
            continue
        inside = (probs > row.low) & (probs <= row.high) | ((probs == 0) & (row.low == 0))
        its_groups = [groups[i] for i in np.flatnonzero(inside).tolist()]
        interval = grouped_rate_interval(is_yes[inside], its_groups)
        points.append(
            ReliabilityPoint(
                row.low, row.high, row.num_samples, row.mean_prob, row.share_of_yes, interval
            )
        )
    return Reliability(name, tuple(points), calibration_error(is_yes, probs), len(is_yes))


def _all_answers(
    rows: PredictedRows,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64], list[str]]:
    if not rows.has_labels:
        preds = rows.preds
        return preds == rows.targets, rows.probs[np.arange(len(preds)), preds], rows.groups
    known = ~np.isnan(rows.targets)
    of_row = np.nonzero(known)[0].tolist()
    # Labels of one row are no rows of their own: a row without a group is one.
    groups = [rows.groups[i] or f"\0{i}" for i in of_row]
    return rows.targets[known] == 1, rows.probs[known], groups
