"""Are probabilities what they say? Brier score, log loss, calibration error, net benefit.

All in NumPy, as ``scores`` is; the tests compare with scikit-learn and MAPIE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.metrics.scores import compute_score

NUM_BINS = 10
"""Bins of the calibration error and of the reliability table, as in Naeini et al. (2015)."""

_Floats = npt.NDArray[np.float64]
_Mask = npt.NDArray[np.bool_]


class ReliabilityBin(NamedTuple):
    """Rows with a probability in (low, high], the first bin with those of 0 too."""

    low: float
    high: float
    num_samples: int
    mean_prob: float | None
    """Mean probability of its rows; None where there are none, as is the next."""

    share_of_yes: float | None
    """How many of its rows are yes: equal to the mean probability where that is calibrated."""


class NetBenefit(NamedTuple):
    """What a threshold gains, in true positives a row; ``treat_none`` gains nothing: 0."""

    threshold: float
    net_benefit: float
    treat_all: float
    """Net benefit of taking every row for positive."""


def measure_calibration(
    targets: npt.NDArray[Any], probs: npt.NDArray[Any], classes: Sequence[str]
) -> dict[str, Any]:
    """Return how well probabilities are calibrated.

    Args:
        targets: As for ``scores.compute_metrics``, as are the other two.
        probs: (N, C).
        classes: C names.

    Returns:
        A JSON object, less being better in all but the last: ``brier`` (Brier, 1950): the mean
        squared error of the probability of one of two classes, in [0, 1]; of three or more, summed
        over the classes, in [0, 2]. ``log_loss``: mean -ln of the target's probability. ``ece``,
        the expected calibration error (Guo et al., 2017) of the most probable class: the mean
        over the rows, in bins by that probability, of |share that is right - mean probability|.
        ``num_bins``: ``NUM_BINS`` of equal width.

        For several labels a row: Brier score and log loss are means over the known targets, the
        calibration error is that of the probability of yes, a mean over the classes with known
        targets.

    Raises:
        DataError: If the arrays are empty, do not fit each other or hold NaN.
    """
    log_loss = compute_score("loss", targets, probs, classes)  # refuses what is no probability
    if targets.ndim == 2:
        known = ~np.isnan(targets)
        brier = float(((probs - targets)[known] ** 2).mean())
        errors = [
            calibration_error(targets[known[:, i], i] == 1, probs[known[:, i], i])
            for i in range(len(classes)) if known[:, i].any()
        ]  # fmt: skip
        ece = float(np.mean(errors))
    else:
        preds, rows = probs.argmax(axis=1), np.arange(len(targets))
        of_target = probs[rows, targets]
        squares = (probs.astype(np.float64) ** 2).sum(axis=1) - 2 * of_target + 1
        brier = float(squares.mean()) / (2 if len(classes) == 2 else 1)
        ece = calibration_error(preds == targets, probs[rows, preds])
    return {"brier": brier, "log_loss": log_loss, "ece": ece, "num_bins": NUM_BINS}


def reliability_table(
    is_yes: _Mask, probs: npt.NDArray[np.floating], num_bins: int = NUM_BINS
) -> list[ReliabilityBin]:
    """Return how often rows are yes, in bins of equal width of the probability of it.

    Args:
        is_yes: (n,), n >= 1.
        probs: (n,) in [0, 1].
        num_bins: How many bins, one or more; all are in the table, the empty ones too.

    Raises:
        DataError: If there are no rows, lengths differ, or a probability is not in [0, 1].
    """
    _check(is_yes, probs)
    if num_bins < 1:
        raise DataError("num_bins", expected="one or more", found=num_bins)
    edges = np.linspace(0, 1, num_bins + 1)
    places = np.searchsorted(edges[1:-1], probs, side="left")
    numbers, sums, yes = (
        np.bincount(places, weights=weights, minlength=num_bins)
        for weights in (None, probs, is_yes)
    )
    return [
        ReliabilityBin(
            float(edges[i]), float(edges[i + 1]), int(number),
            float(sums[i] / number) if number else None,
            float(yes[i] / number) if number else None,
        )
        for i, number in enumerate(numbers)
    ]  # fmt: skip


def calibration_error(
    is_yes: _Mask, probs: npt.NDArray[np.floating], num_bins: int = NUM_BINS
) -> float:
    """Return the expected calibration error of the probability of yes, 0 to 1.

    The mean over the rows of |share of yes - mean probability| of a row's bin in
    ``reliability_table``. It depends on the bins, and of few rows it is above 0 by chance alone: of
    100 rows of a calibrated head about 0.1, of 1,000 about 0.03 (probabilities evenly spread).
    Brier score and log loss need no bins.

    Args:
        is_yes: As for ``reliability_table``, as are the other two.
        probs: (n,).
        num_bins: How many bins.

    Raises:
        DataError: As ``reliability_table``.
    """
    return sum(
        row.num_samples / len(is_yes) * abs(row.share_of_yes - row.mean_prob)
        for row in reliability_table(is_yes, probs, num_bins)
        if row.share_of_yes is not None and row.mean_prob is not None
    )


def decision_curve(
    is_yes: _Mask, probs: npt.NDArray[np.floating], thresholds: Sequence[float]
) -> list[NetBenefit]:
    """Return the net benefit of calling rows positive from a threshold on (Vickers, Elkin, 2006).

    True positives less false positives, these times the odds of the threshold, over all rows: who
    acts from a probability of 0.1 on holds a missed case for nine times as bad as a false alarm.
    It means something only where the probabilities are calibrated and the share of yes is that of
    the place where the head will be used.

    Args:
        is_yes: (n,), n >= 1.
        probs: (n,) of yes, in [0, 1].
        thresholds: In [0, 1). A row is positive if its probability is at least the threshold.

    Raises:
        DataError: If there are no rows, lengths differ, or a number is out of its range.
    """
    _check(is_yes, probs)
    limits = np.asarray(thresholds, np.float64)
    if not ((limits >= 0) & (limits < 1)).all():
        raise DataError("thresholds", expected="numbers from 0 to below 1", found=list(thresholds))
    total, num_yes = len(is_yes), int(is_yes.sum())
    yes, no = np.sort(probs[is_yes]), np.sort(probs[~is_yes])
    odds = limits / (1 - limits)
    true_positive = num_yes - np.searchsorted(yes, limits, side="left")
    false_positive = len(no) - np.searchsorted(no, limits, side="left")
    benefits = (true_positive - odds * false_positive) / total
    of_all = (num_yes - odds * len(no)) / total
    return [NetBenefit(*map(float, row)) for row in zip(limits, benefits, of_all, strict=True)]


def _check(is_yes: _Mask, probs: npt.NDArray[np.floating]) -> None:
    if probs.shape != is_yes.shape or not len(is_yes):
        raise DataError("probs", expected=f"one for each of {len(is_yes)} rows, one or more",
                        found=f"shape {probs.shape}")  # fmt: skip
    if not ((probs >= 0) & (probs <= 1)).all():
        raise DataError("probs", expected="numbers from 0 to 1", found="others, or NaN")
