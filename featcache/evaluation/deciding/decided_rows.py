"""What the thresholds of a run do to labelled rows, beside the most probable class.

Reads and writes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.evaluation.deciding.decision_file import Decisions
from featcache.evaluation.deciding.rates import (
    known_groups,
    rates_beside_referred,
    rates_of_groups,
    rates_of_images,
)
from featcache.evaluation.predicted_rows import PredictedRows
from featcache.metrics.temperature import mean_log_loss


def measure_decisions(
    decisions: Decisions | None, rows: PredictedRows
) -> dict[str, dict[str, Any]] | None:
    """Return what the thresholds of a run do to rows, None without thresholds.

    Returns:
        Class -> ``threshold``, ``refer_below``, ``temperature``, ``wish``, ``on``, ``basis``,
        ``unit``, ``bound`` as ``decide`` wrote them. ``image``: ``recall`` and ``specificity``,
        each with ``hits, total, bound, interval``, and ``share_positive``; ``group``, likewise by
        the highest score, None without groups; ``argmax``, likewise per image of the most probable
        class (with several labels: above 0.5). ``false_negatives``: paths below the threshold.
        ``refer``: ``share, num_referred, recall, specificity``, the last two among the rest, None
        without. ``log_loss`` and ``calibrated_log_loss``, None without a temperature.
    """
    if decisions is None:
        return None
    calibrated = decisions.calibrate(rows.probs)
    return {
        name: rule | _measure(name, rule, rows, calibrated)
        for name, rule in decisions.brief().items()
    }


def _measure(
    name: str, rule: dict[str, Any], rows: PredictedRows,
    calibrated: dict[str, npt.NDArray[np.float64]],
) -> dict[str, Any]:  # fmt: skip
    column = rows.classes.index(name)
    if rows.has_labels:
        known = np.flatnonzero(~np.isnan(rows.targets[:, column]))
        is_positive = rows.targets[known, column] == 1
        most_probable = rows.preds[known, column].astype(np.float64)
    else:
        known = np.arange(len(rows.targets))
        is_positive = rows.targets == column
        most_probable = (rows.preds == column).astype(np.float64)
    scores = rows.probs[known, column]
    groups = known_groups([rows.groups[row] for row in known.tolist()])
    low, high = rule["threshold"], rule["refer_below"]
    if not len(known):
        return dict.fromkeys(("image", "group", "argmax", "refer", *_LOSSES)) | {
            "false_negatives": []
        }
    missed = known[is_positive & (scores < low)]
    return {
        "image": rates_of_images(scores, is_positive, low, groups),
        "group": rates_of_groups(scores, is_positive, low, groups),
        "argmax": rates_of_images(most_probable, is_positive, 1.0, groups),
        "false_negatives": [rows.paths[row] for row in missed.tolist()],
        "refer": (
            None if high is None
            else rates_beside_referred(scores, is_positive, low, high, groups)
        ),
        **_losses(name, rows, known, calibrated),
    }  # fmt: skip


_LOSSES = ("log_loss", "calibrated_log_loss")


def _losses(
    name: str, rows: PredictedRows, known: npt.NDArray[np.int64],
    calibrated: dict[str, npt.NDArray[np.float64]],
) -> dict[str, float | None]:  # fmt: skip
    """Return the log loss of the rows, of one label or of the classes, without and with it."""
    if name not in calibrated:
        return dict.fromkeys(_LOSSES)
    if rows.has_labels:
        column = rows.classes.index(name)
        targets = rows.targets[known, column].astype(np.int64)
        both = [
            np.stack([1 - of_yes[known], of_yes[known]], axis=1)
            for of_yes in (rows.probs[:, column], calibrated[name])
        ]
    else:
        targets = rows.targets
        both = [rows.probs, np.stack([calibrated[name] for name in rows.classes], axis=1)]
    losses = [mean_log_loss(probs, targets) for probs in both]
    return dict(zip(_LOSSES, losses, strict=True))
