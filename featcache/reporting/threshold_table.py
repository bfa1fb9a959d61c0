"""What every threshold does to rows: counts and intervals, for the slider of the page.

The page looks its numbers up here, so they are those of ``featcache.metrics``, groups and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.metrics.rates import Interval, number_groups, numbered_rate_interval
from featcache.metrics.thresholds import MAX_THRESHOLD

MAX_STEPS = 400
"""Of more distinct scores, so many thresholds are kept, evenly spread over the ranked rows."""


class Step(NamedTuple):
    """A threshold. Positive is a score >= it."""

    threshold: float
    true_positives: int
    false_positives: int
    intervals: tuple[Interval | None, ...]
    """95 % of recall, specificity, PPV and NPV, as ``metrics.rates`` has them; None without rows.
    """


def threshold_table(
    scores: npt.NDArray[np.floating],
    is_positive: npt.NDArray[np.bool_],
    groups: Sequence[str] | None,
    chosen: float,
) -> tuple[list[Step], int]:
    """Return the thresholds that do different things, ascending, and which of them is ``chosen``.

    Args:
        scores: (n,) probabilities of the positive class, n >= 1.
        is_positive: (n,).
        groups: n names, empty for a row without a group; None where there are none.
        chosen: The threshold that is in use; it is one of those that are returned.
    """
    distinct = np.unique(scores)
    place = int(np.searchsorted(distinct, chosen, side="left"))  # distinct[place] >= chosen
    places = np.arange(len(distinct) + 1)
    if len(places) > MAX_STEPS:
        ends = np.searchsorted(np.sort(scores), distinct[[0, -1]], side="left")
        ranks = np.linspace(ends[0], ends[1], MAX_STEPS - 1).round().astype(int)
        kept = np.searchsorted(distinct, np.sort(scores)[ranks])
        places = np.unique([*kept.tolist(), len(distinct), place])
    numbers = number_groups([""] * len(scores) if groups is None else groups)
    steps = [
        _measure(_between(distinct, i) if i != place else chosen, scores, is_positive, numbers)
        for i in places.tolist()
    ]
    return steps, int(np.searchsorted(places, place))


def _measure(
    threshold: float,
    scores: npt.NDArray[np.floating],
    is_positive: npt.NDArray[np.bool_],
    numbers: npt.NDArray[np.int64],
) -> Step:
    is_called = scores >= threshold
    parts = (
        (is_positive, is_called), (~is_positive, ~is_called),
        (is_called, is_positive), (~is_called, ~is_positive),
    )  # fmt: skip
    return Step(
        threshold, int((is_called & is_positive).sum()), int((is_called & ~is_positive).sum()),
        tuple(
            numbered_rate_interval(hits[of_which], numbers[of_which]) if of_which.any() else None
            for of_which, hits in parts
        ),
    )  # fmt: skip


def _between(distinct: npt.NDArray[np.floating], place: int) -> float:
    """Return a short number above ``distinct[place - 1]`` and up to ``distinct[place]``."""
    if place == 0:
        return 0.0
    low = float(distinct[place - 1])
    high = float(distinct[place]) if place < len(distinct) else MAX_THRESHOLD
    middle = (low + high) / 2
    for digits in range(2, 17):
        if low < (short := round(middle, digits)) <= high:
            return short
    return high
