"""What a threshold does to rows: recall, specificity and how many are called positive.

Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.files import result_as_dict
from featcache.metrics.thresholds import (
    Rate,
    measure_recall,
    measure_specificity,
    unit_scores,
)

Scores = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]


def rates_of_images(
    scores: Scores, is_positive: Mask, threshold: float, groups: Sequence[str] | None
) -> dict[str, Any]:
    """Return ``recall``, ``specificity`` and ``share_positive`` of a threshold, per image.

    Intervals respect groups.

    Args:
        scores: (n,)
        is_positive: (n,)
        threshold: Positive is a score >= it.
        groups: n names, empty for a row without a group; None where there are none.
    """
    return {
        "recall": _as_json(measure_recall(scores, is_positive, threshold, groups)),
        "specificity": _as_json(measure_specificity(scores, is_positive, threshold, groups)),
        "share_positive": float((scores >= threshold).mean()),
    }


def rates_of_groups(
    scores: Scores, is_positive: Mask, threshold: float, groups: Sequence[str] | None
) -> dict[str, Any] | None:
    """Return the same per group, by its highest score; None without groups."""
    if groups is None:
        return None
    return rates_of_images(*unit_scores(scores, is_positive, groups), threshold, None)


def rates_beside_referred(
    scores: Scores, is_positive: Mask, low: float, high: float, groups: Sequence[str] | None
) -> dict[str, Any]:
    """Return how many images lie between two thresholds, and the rates among the others.

    Returns:
        ``share``, ``num_referred``, ``recall`` and ``specificity``.
    """
    is_referred = (scores >= low) & (scores < high)
    if groups is not None:
        groups = [groups[row] for row in np.flatnonzero(~is_referred).tolist()]
    rest = scores[~is_referred], is_positive[~is_referred], high, groups
    return {
        "share": float(is_referred.mean()), "num_referred": int(is_referred.sum()),
        "recall": _as_json(measure_recall(*rest)),
        "specificity": _as_json(measure_specificity(*rest)),
    }  # fmt: skip


def known_groups(groups: list[str]) -> list[str] | None:
    """Return names of groups, None if no row has one."""
    return groups if any(groups) else None


def _as_json(rate: Rate) -> dict[str, Any]:
    return result_as_dict(rate)
