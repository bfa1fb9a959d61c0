"""Thresholds: where to put one so that a wished recall or specificity can be promised.

Positive is a score >= the threshold, everywhere. Scores are probabilities.

How many misses are allowed is fixed by the number of positive units and the wish, before any score
is looked at; the threshold is then an order statistic of the scores, and the exact binomial bound
(Clopper and Pearson, 1934) holds for it: Wilks, 1941, on tolerance limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache.errors import ConfigError
from featcache.metrics.rates import Interval, grouped_rate_interval, lower_bound, rate_interval

CONFIDENCE = 0.95
STABLE_GAP = 0.05
"""Two neighbouring scores are wide enough apart if their log-odds differ by so much.

Another engine may change features by 1e-4 (relative L2, the bound of fp32). Such noise moved the
log-odds of 284 X-rays by up to 0.0135 (five heads, 20 seeds each; measured once, script not kept).
Half this gap is 0.025, so no row changes sides. That is not so for noise made on purpose (0.15),
nor for tf32, fp16 and bf16.
"""
MAX_THRESHOLD = math.nextafter(1, 2)  # above every probability: nothing is called positive

Scores = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Choice:
    """A threshold, and what can be said of a wished rate for it.

    Attributes:
        threshold: Positive is a score >= it.
        num_units: Units of the class that the wish is about.
        num_right: Of them, those on the right side of the threshold.
        num_allowed: Units that may be on the wrong side, fixed before looking. Where equal scores
            forbid a threshold between them, fewer are.
        bound: One-sided exact lower bound of the rate on new units, with ``num_allowed`` on the
            wrong side.
        is_reached: Whether the bound reaches the wish.
        num_needed: Units that the wish needs when none is on the wrong side.
    """

    threshold: float
    num_units: int
    num_right: int
    num_allowed: int
    bound: float
    is_reached: bool
    num_needed: int


@dataclass(frozen=True)
class Rate:
    """A rate with what is known of it.

    Attributes:
        hits: Rows or units that count as right.
        total: All of them.
        bound: One-sided exact lower bound, as of independent rows; None where there are none.
        interval: Two-sided 95 % interval; with groups, it respects them. None likewise.
    """

    hits: int
    total: int
    bound: float | None
    interval: tuple[float, float] | None


def check_wish(name: str, wish: float) -> float:
    """Return a wished rate.

    Raises:
        ConfigError: If it is not in (0, 1).
    """
    if not 0 < wish < 1:
        raise ConfigError(
            f"--{name}", expected="a number above 0 and below 1", found=wish,
            hint="No number of images can promise 1" if wish == 1 else "For 95 % write 0.95",
        )  # fmt: skip
    return float(wish)


def num_needed(wish: float, num_wrong: int = 0, confidence: float = CONFIDENCE) -> int:
    """Return how many units a wish needs when so many of them are on the wrong side.

    Of none: 59 for 0.95, 29 for 0.90, 299 for 0.99.
    """
    if num_wrong == 0:
        guess = math.ceil(math.log1p(-confidence) / math.log(wish) - 1e-9)
        return max(guess, 1)
    low, high = num_wrong + 1, num_wrong + 2
    while lower_bound(high - num_wrong, high, confidence) < wish:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if lower_bound(middle - num_wrong, middle, confidence) < wish:
            low = middle + 1
        else:
            high = middle
    return high


def most_misses(num_units: int, wish: float, confidence: float = CONFIDENCE) -> int | None:
    """Return the most units that may be on the wrong side for the bound to reach the wish.

    Returns:
        None if even without one it does not.
    """
    if num_units < num_needed(wish, 0, confidence):
        return None
    low, high = 0, num_units  # low serves, high does not: its bound is 0
    while high - low > 1:
        middle = (low + high) // 2
        if lower_bound(num_units - middle, num_units, confidence) >= wish:
            low = middle
        else:
            high = middle
    return low


def unit_scores(
    scores: Scores, is_positive: Mask, groups: Sequence[str] | None
) -> tuple[Scores, Mask]:
    """Return a score and whether it is positive of each unit: a group, or a row without one.

    A group has its highest score, and is positive if any of its rows is.

    Args:
        scores: (n,)
        is_positive: (n,)
        groups: n names, empty for a row without a group; None where there are none.
    """
    if groups is None:
        return scores, is_positive
    known: dict[tuple[str, int], int] = {}
    keys = [(name, -1 if name else row) for row, name in enumerate(groups)]
    numbers = np.array([known.setdefault(key, len(known)) for key in keys], np.int64)
    highest, any_positive = np.full(len(known), -np.inf), np.zeros(len(known), bool)
    np.maximum.at(highest, numbers, scores)
    np.logical_or.at(any_positive, numbers, is_positive)
    return highest, any_positive


def choose_for_recall(
    scores: Scores, is_positive: Mask, recall: float, groups: Sequence[str] | None = None,
    confidence: float = CONFIDENCE,
) -> Choice:  # fmt: skip
    """Return the threshold that promises a recall, or comes nearest to it.

    It misses as many positive units as are allowed; where no number serves, none. Of all gaps
    between neighbouring scores that do so, it lies in the middle of the highest that is at least
    ``STABLE_GAP`` wide, else in the widest. Units: ``unit_scores``.

    The bound is of the lowest score that is found. A threshold at or below it has at least its
    recall, so any of these gaps keeps the bound. They differ in specificity: that of the widest
    gap was lower than that of a threshold just below the lowest found score, by 0.02 to 0.03 in
    the median and up to 0.21 (400 drawn sets of 500 negatives). So the highest is taken.

    Args:
        scores: (n,) probabilities of the positive class.
        is_positive: (n,), one or more.
        recall: In (0, 1).
        groups: n names, empty for a row without a group; None where there are none.
        confidence: Of the one-sided bound.

    Raises:
        ConfigError: If the recall is not in (0, 1), or nothing is positive.
    """
    check_wish("recall", recall)
    of_units, positive = unit_scores(scores, is_positive, groups)
    ordered = np.sort(of_units[positive])
    _require_units(len(ordered), "positive")
    allowed = most_misses(len(ordered), recall, confidence)
    num_misses = allowed or 0
    while num_misses and ordered[num_misses - 1] == ordered[num_misses]:
        num_misses -= 1  # equal scores are never parted
    below = ordered[num_misses - 1] if num_misses else -np.inf
    threshold = _choose_gap(scores, float(below), float(ordered[num_misses]), highest=True)
    num_right = int((ordered >= threshold).sum())
    return _choice(threshold, len(ordered), num_right, allowed, recall, confidence)


def choose_for_specificity(
    scores: Scores, is_positive: Mask, specificity: float, groups: Sequence[str] | None = None,
    confidence: float = CONFIDENCE,
) -> Choice:  # fmt: skip
    """Return the threshold that promises a specificity, or comes nearest to it.

    As ``choose_for_recall``, of the units without any positive row, and with the lowest gap.

    Raises:
        ConfigError: If the specificity is not in (0, 1), or nothing is negative.
    """
    check_wish("specificity", specificity)
    of_units, positive = unit_scores(scores, is_positive, groups)
    ordered = np.sort(of_units[~positive])[::-1]
    _require_units(len(ordered), "negative")
    allowed = most_misses(len(ordered), specificity, confidence)
    num_wrong = allowed or 0
    while num_wrong and ordered[num_wrong - 1] == ordered[num_wrong]:
        num_wrong -= 1
    above = ordered[num_wrong - 1] if num_wrong else np.inf
    threshold = _choose_gap(scores, float(ordered[num_wrong]), float(above), highest=False)
    num_right = int((ordered < threshold).sum())
    return _choice(threshold, len(ordered), num_right, allowed, specificity, confidence)


def measure_recall(
    scores: Scores, is_positive: Mask, threshold: float, groups: Sequence[str] | None = None
) -> Rate:
    """Return which share of the positive rows is found by a threshold."""
    return _rate(scores[is_positive] >= threshold, _of(groups, is_positive))


def measure_specificity(
    scores: Scores, is_positive: Mask, threshold: float, groups: Sequence[str] | None = None
) -> Rate:
    """Return which share of the other rows is below a threshold."""
    return _rate(scores[~is_positive] < threshold, _of(groups, ~is_positive))


def refer_below(scores: Scores, threshold: float, share: float) -> float:
    """Return the upper of two thresholds: rows from ``threshold`` to below it are referred.

    It is as high as it can be with at most ``share`` of the rows referred, in the middle of a gap:
    what is below the lower threshold, and so the recall that was promised, stays as it is.

    Raises:
        ConfigError: If the share is not in (0, 1).
    """
    if not 0 < share < 1:
        raise ConfigError("--refer", expected="a share above 0 and below 1", found=share)
    above = np.sort(scores[scores >= threshold])
    most = int(np.floor(share * len(scores) + 1e-9))
    if len(above) <= most:
        return MAX_THRESHOLD
    while most and above[most - 1] == above[most]:
        most -= 1
    if most == 0:
        return threshold
    return _middle(float(above[most - 1]), float(above[most]))


def predictive_values(
    recall: float, specificity: float, prevalence: float
) -> tuple[float | None, float | None]:
    """Return PPV and NPV where a share ``prevalence`` of all is positive (Bayes).

    Returns:
        None in place of one that is undefined: nothing is called positive, or nothing negative.

    Raises:
        ConfigError: If the prevalence is not in (0, 1).
    """
    if not 0 < prevalence < 1:
        raise ConfigError("--prevalence", expected="above 0 and below 1", found=prevalence)
    found, missed = prevalence * recall, prevalence * (1 - recall)
    alarms, cleared = (1 - prevalence) * (1 - specificity), (1 - prevalence) * specificity
    ppv = found / (found + alarms) if found + alarms > 0 else None
    return ppv, cleared / (cleared + missed) if cleared + missed > 0 else None


def predictive_value_intervals(
    recall: float, specificity: float, intervals: tuple[Interval, Interval], prevalence: float
) -> tuple[Interval | None, Interval | None]:
    """Return the two-sided intervals of PPV and NPV, from those of recall and specificity.

    The odds of PPV are recall / (1 - specificity), times the odds of the prevalence; those of NPV
    are specificity / (1 - recall), times their inverse. The interval of such a ratio of independent
    rates comes from the rates' own (MOVER-R: Donner and Zou, 2012; Newcombe, 2016), so that it
    allows for groups where these do, and has a width where a rate is 0 or 1. The prevalence is
    taken as known.

    Args:
        recall: In [0, 1].
        specificity: In [0, 1].
        intervals: Of both.
        prevalence: In (0, 1).

    Returns:
        None in place of that of a value which is undefined: see ``predictive_values``.
    """
    (low, high), (least, most) = intervals
    odds = prevalence / (1 - prevalence)
    found = _ratio_interval(recall, (low, high), 1 - specificity, (1 - most, 1 - least))
    cleared = _ratio_interval(specificity, (least, most), 1 - recall, (1 - high, 1 - low))
    return _shares(found, odds), _shares(cleared, 1 / odds)


def _ratio_interval(one: float, of_one: Interval, other: float, of_other: Interval) -> Interval:
    """Return the interval of one / other; both ends are infinite where both are 0."""
    (low, high), (least, most) = of_one, of_other
    product = one * other
    inner = max(product**2 - low * most * (2 * one - low) * (2 * other - most), 0.0)
    outer = max(product**2 - high * least * (2 * one - high) * (2 * other - least), 0.0)
    down, up = product + math.sqrt(inner), least * (2 * other - least)
    if one == other == 0:
        return math.inf, math.inf
    # the lower end is written so that nothing is 0 / 0 where ``most`` is twice ``other``
    lower = low * (2 * one - low) / down if down > 0 else 0.0
    return lower, (product + math.sqrt(outer)) / up if up > 0 else math.inf


def _shares(ratios: Interval, odds: float) -> Interval | None:
    """Return odds / (1 + odds) of both ends of an interval of odds, which are to be multiplied."""
    if ratios[0] == math.inf:
        return None
    low, high = (ratio * odds for ratio in ratios)
    return low / (1 + low), 1.0 if high == math.inf else high / (1 + high)


def _require_units(number: int, kind: str) -> None:
    if not number:
        raise ConfigError("scores", expected=f"one or more {kind} rows", found="none")


def _choice(  # noqa: PLR0917 (the facts of one result)
    threshold: float, total: int, right: int, allowed: int | None, wish: float, confidence: float
) -> Choice:
    bound = lower_bound(total - (allowed or 0), total, confidence)
    needed = num_needed(wish, 0, confidence)
    return Choice(threshold, total, right, allowed or 0, bound, allowed is not None, needed)


def _choose_gap(scores: Scores, low: float, high: float, *, highest: bool) -> float:
    """Return the middle of a gap between neighbours among the scores from low to high.

    It is the highest, or the lowest, that is wide enough, else the widest. One of the two ends may
    be infinite. Where no row lies beyond the other, 0 or 1 is the neighbour of the last.
    """
    within = np.unique(scores[(scores >= low) & (scores <= high)])
    if len(within) == 1:
        within = np.array([0.0, within[0]] if low == -np.inf else [within[0], 1.0])
        if within[0] == within[1]:
            return 0.0 if low == -np.inf else MAX_THRESHOLD
    widths = np.diff(log_odds(within))
    wide = np.flatnonzero(widths >= STABLE_GAP)
    place = int(wide[-1 if highest else 0]) if len(wide) else int(widths.argmax())
    return _middle(float(within[place]), float(within[place + 1]))


def log_odds(probs: Scores) -> npt.NDArray[np.float64]:
    """Return log(p / (1 - p)) of probabilities, with p at least 1e-12 from 0 and 1."""
    clipped = np.clip(probs.astype(np.float64), 1e-12, 1 - 1e-12)
    odds: npt.NDArray[np.float64] = np.log(clipped) - np.log1p(-clipped)
    return odds


def _middle(low: float, high: float) -> float:
    """Return a number above low and up to high: their middle, where floats allow."""
    middle = (low + high) / 2
    return middle if middle > low else high


def _of(groups: Sequence[str] | None, which: Mask) -> list[str] | None:
    return None if groups is None else [groups[row] for row in np.flatnonzero(which).tolist()]


def _rate(is_hit: Mask, groups: list[str] | None) -> Rate:
    total, hits = len(is_hit), int(is_hit.sum())
    if not total:
        return Rate(0, 0, None, None)
    interval = (
        rate_interval(hits, total) if groups is None else grouped_rate_interval(is_hit, groups)
    )
    return Rate(hits, total, lower_bound(hits, total), interval)
