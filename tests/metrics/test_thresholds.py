from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import binomtest

from featcache.errors import ConfigError
from featcache.metrics.rates import rate_interval
from featcache.metrics.thresholds import (
    MAX_THRESHOLD,
    STABLE_GAP,
    choose_for_recall,
    choose_for_specificity,
    log_odds,
    measure_recall,
    measure_specificity,
    most_misses,
    num_needed,
    predictive_value_intervals,
    predictive_values,
    refer_below,
    unit_scores,
)


def exact(hits: int, total: int) -> float:
    """The one-sided bound by SciPy: another way than ours."""
    return float(binomtest(hits, total, alternative="greater").proportion_ci(0.95, "exact").low)


@pytest.mark.parametrize(
    ("wish", "numbers"),
    [(0.95, [59, 93, 124]), (0.9, [29, 46, 61]), (0.99, [299, 473, 628])],
)
def test_units_that_a_wish_needs(wish: float, numbers: list[int]) -> None:
    assert [num_needed(wish, misses) for misses in range(3)] == numbers
    for misses, number in enumerate(numbers):
        assert most_misses(number, wish) == misses
        assert most_misses(number - 1, wish) == (misses - 1 if misses else None)


@pytest.mark.parametrize("wish", [0.3, 0.8, 0.95])
def test_most_misses_are_those_of_a_search_through_all(wish: float) -> None:
    for total in (1, 2, 13, 60, 149):
        serving = [k for k in range(total) if exact(total - k, total) >= wish]
        assert most_misses(total, wish) == max(serving, default=None)


def draw(seed: int, num_positive: int, num_negative: int, digits: int = 16) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    is_positive = np.arange(num_positive + num_negative) < num_positive
    logits = rng.normal(size=len(is_positive)) + 1.5 * is_positive
    return (1 / (1 + np.exp(-logits))).round(digits), is_positive


@pytest.mark.parametrize("digits", [16, 2, 1])
@pytest.mark.parametrize("num_positive", [1, 13, 59, 93, 200])
def test_the_threshold_is_in_the_highest_stable_gap_that_keeps_the_misses(
    num_positive: int, digits: int
) -> None:
    scores, is_positive = draw(num_positive, num_positive, 80, digits)
    choice = choose_for_recall(scores, is_positive, 0.95)
    misses = num_positive - choice.num_right
    assert misses == (scores[is_positive] < choice.threshold).sum() <= choice.num_allowed
    assert choice.bound == pytest.approx(exact(num_positive - choice.num_allowed, num_positive))
    assert choice.is_reached == (num_positive >= 59)
    assert choice.num_needed == 59
    if digits == 16:
        assert misses == choice.num_allowed  # without ties exactly as many as are allowed
    else:
        ordered = np.sort(scores[is_positive])
        assert all(ordered[k - 1] == ordered[k] for k in range(misses + 1, choice.num_allowed + 1))
    values = np.unique(scores)
    gaps = [
        (low, high) for low, high in itertools.pairwise(values)
        if (scores[is_positive] < (low + high) / 2).sum() == misses
    ]  # fmt: skip
    assert not (scores == choice.threshold).any()
    below, above = scores[scores < choice.threshold], scores[scores >= choice.threshold]
    if gaps:
        stable = [gap for gap in gaps if width(gap) >= STABLE_GAP]
        low, high = max(stable) if stable else max(gaps, key=width)
        assert (below.max(), above.min()) == (low, high)
        assert choice.threshold == pytest.approx((low + high) / 2)


def width(gap: tuple[float, float]) -> float:
    return float(logit(gap[1]) - logit(gap[0]))


@given(st.integers(0, 10**6), st.sampled_from([0.3, 1.5, 4.0, 12.0]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_noise_of_half_a_stable_gap_changes_a_decision(
    seed: int, spread: float, for_recall: bool
) -> None:
    rng = np.random.default_rng(seed)
    is_positive = np.arange(40) < rng.integers(1, 40)
    logits = spread * (rng.normal(size=40) + 1.5 * is_positive)
    choose = choose_for_recall if for_recall else choose_for_specificity
    threshold = choose(expit(logits), is_positive, 0.9).threshold
    inside = np.sort(logits[is_positive == for_recall])
    # where no neighbour is so far away, nothing can be promised
    if np.abs(logits - logit(threshold)).min() < STABLE_GAP / 2 - 4e-4:
        allowed = most_misses(len(inside), 0.9) or 0
        low, high = (
            (inside[allowed - 1] if allowed else -np.inf, inside[allowed]) if for_recall
            else (inside[::-1][allowed], inside[::-1][allowed - 1] if allowed else np.inf)
        )  # fmt: skip
        between = np.unique(logits[(logits >= low) & (logits <= high)])
        assert (np.diff(between) < STABLE_GAP).all()
        return
    noisy = logits + rng.uniform(-1, 1, 40) * (STABLE_GAP / 2 - 4e-4)
    assert ((expit(noisy) >= threshold) == (expit(logits) >= threshold)).all()


def test_a_sure_head_has_scores_of_0_and_1() -> None:
    scores = np.array([0, 1e-300, 1e-5, 1 - 1e-16, 1, 1])
    choice = choose_for_recall(scores, scores > 0.5, 0.5)
    assert 1e-5 < choice.threshold < 1 - 1e-10
    assert choice.num_right == 3
    assert np.isfinite(log_odds(scores)).all()


def test_specificity_is_recall_of_the_others() -> None:
    scores, is_positive = draw(3, 70, 130)
    for wish in (0.9, 0.95, 0.99):
        one = choose_for_specificity(scores, is_positive, wish)
        mirrored = choose_for_recall(1 - scores, ~is_positive, wish)
        assert one.threshold == pytest.approx(1 - mirrored.threshold)
        assert (one.num_units, one.num_right, one.num_allowed, one.bound) == (
            mirrored.num_units, mirrored.num_right, mirrored.num_allowed, mirrored.bound,
        )  # fmt: skip


def test_sets_without_one_side() -> None:
    all_positive = choose_for_recall(np.array([0.4, 0.6]), np.ones(2, bool), 0.9)
    assert all_positive.threshold == 0.2
    assert (all_positive.num_right, all_positive.is_reached) == (2, False)
    nobody = choose_for_recall(np.zeros(3), np.ones(3, bool), 0.9)
    assert nobody.threshold == 0
    assert nobody.num_right == 3
    one = choose_for_recall(np.array([0.5, 0.1, 0.2]), np.array([True, False, False]), 0.5)
    assert one.threshold == pytest.approx(0.35)
    assert one.bound == pytest.approx(0.05)
    assert choose_for_specificity(np.ones(2), np.zeros(2, bool), 0.9).threshold == MAX_THRESHOLD
    with pytest.raises(ConfigError, match="positive rows, found none"):
        choose_for_recall(np.ones(2), np.zeros(2, bool), 0.9)
    with pytest.raises(ConfigError, match="negative rows, found none"):
        choose_for_specificity(np.ones(2), np.ones(2, bool), 0.9)


@pytest.mark.parametrize("wish", [0, 1, 1.2, -0.1, math.nan])
def test_a_wish_that_is_no_rate_is_refused(wish: float) -> None:
    for choose in (choose_for_recall, choose_for_specificity):
        with pytest.raises(ConfigError, match="above 0 and below 1"):
            choose(np.array([0.1, 0.2]), np.array([True, False]), wish)


def test_a_group_counts_once_by_its_highest_score() -> None:
    scores = np.array([0.2, 0.9, 0.3, 0.4, 0.1, 0.6])
    is_positive = np.array([True, False, False, False, True, False])
    groups = ["a", "a", "b", "", "", "b"]
    of_units, positive = unit_scores(scores, is_positive, groups)
    assert [*of_units] == [0.9, 0.6, 0.4, 0.1]
    assert [*positive] == [True, False, False, True]
    assert choose_for_recall(scores, is_positive, 0.5, groups).num_units == 2
    assert choose_for_specificity(scores, is_positive, 0.5, groups).num_units == 2
    found = measure_recall(scores, is_positive, 0.15, groups)
    assert (found.hits, found.total) == (1, 2)
    others = measure_specificity(scores, is_positive, 0.5)
    assert (others.hits, others.total) == (2, 4)


def test_neighbouring_floats_are_parted() -> None:
    low = 0.5
    high = math.nextafter(low, 1)
    choice = choose_for_recall(np.array([low, high]), np.array([False, True]), 0.9)
    assert low < choice.threshold <= high or choice.threshold < low
    assert choice.num_right == 1


def test_rows_to_refer_are_as_many_as_allowed() -> None:
    scores = np.arange(100) / 100
    for share in (0.05, 0.2, 0.5):
        upper = refer_below(scores, 0.405, share)
        assert ((scores >= 0.405) & (scores < upper)).sum() == round(100 * share)
    assert refer_below(scores, 0.405, 0.7) == MAX_THRESHOLD  # there are no more
    assert refer_below(np.full(10, 0.8), 0.5, 0.5) == 0.5  # equal scores are not parted
    with pytest.raises(ConfigError, match="share"):
        refer_below(scores, 0.5, 1.5)


def test_predictive_values_are_those_of_counting() -> None:
    # 1,000 people, 50 ill: 45 found, 5 missed; of 950 others 95 called ill
    assert predictive_values(0.9, 0.9, 0.05) == pytest.approx((45 / 140, 855 / 860))
    assert predictive_values(0, 1, 0.05) == (None, 0.95)
    assert predictive_values(1, 0, 0.05) == (0.05, None)
    with pytest.raises(ConfigError, match="--prevalence"):
        predictive_values(1, 1, 0)


def by_logs(one: int, other: int, size: int, prevalence: float) -> tuple[float, float]:
    """The interval of odds / (1 + odds) by MOVER on logarithms of rates: another formula."""
    rates, ends = (one / size, other / size), [rate_interval(k, size) for k in (one, other)]
    odds = prevalence / (1 - prevalence)
    middle = math.log(odds * rates[0] / rates[1])
    down = math.hypot(math.log(rates[0] / ends[0][0]), math.log(ends[1][1] / rates[1]))
    up = math.hypot(math.log(ends[0][1] / rates[0]), math.log(rates[1] / ends[1][0]))
    return expit(middle - down), expit(middle + up)


@pytest.mark.parametrize("prevalence", [0.02, 0.3])
def test_intervals_of_predictive_values_agree_with_those_on_the_log_scale(
    prevalence: float,
) -> None:
    size, right, wrong = 4000, 3600, 400
    interval = rate_interval(right, size)
    found = predictive_value_intervals(0.9, 0.9, (interval, interval), prevalence)
    assert found[0] == pytest.approx(by_logs(right, wrong, size, prevalence), abs=2e-3)
    assert found[1] == pytest.approx(by_logs(right, wrong, size, 1 - prevalence), abs=2e-3)


@given(st.integers(0, 30), st.integers(0, 30), st.floats(0.001, 0.999))
def test_intervals_of_predictive_values_hold_the_value_and_have_a_width(
    found: int, cleared: int, prevalence: float
) -> None:
    rates, intervals = (found / 30, cleared / 30), (
        rate_interval(found, 30), rate_interval(cleared, 30),
    )  # fmt: skip
    values = predictive_values(*rates, prevalence)
    ends = predictive_value_intervals(*rates, intervals, prevalence)
    for value, interval in zip(values, ends, strict=True):
        assert (value is None) == (interval is None)
        if value is not None and interval is not None:
            assert 0 <= interval[0] <= value + 1e-12
            assert value - 1e-12 <= interval[1] <= 1
            assert interval[0] < interval[1]


def test_a_rate_of_one_leaves_ppv_and_npv_in_doubt() -> None:
    perfect = rate_interval(20, 20)
    ppv, npv = predictive_value_intervals(1, 1, (perfect, perfect), 0.05)
    assert ppv is not None
    assert npv is not None
    # by hand: the lower end is sqrt(low (2 - low)) / (1 - low), times the odds
    odds = 0.05 / 0.95 * math.sqrt(perfect[0] * (2 - perfect[0])) / (1 - perfect[0])
    assert ppv == (pytest.approx(odds / (1 + odds)), 1)
    assert 0.2 < ppv[0] < 0.35
    assert 0.98 < npv[0] < 1 == npv[1]


@pytest.mark.parametrize("digits", [16, 2])
@pytest.mark.parametrize(("num_positive", "wish"), [(13, 0.95), (59, 0.95), (100, 0.9)])
def test_the_true_recall_is_below_the_bound_in_at_most_5_per_cent(
    num_positive: int, wish: float, digits: int
) -> None:
    rng, sets, fresh = np.random.default_rng(num_positive), 2000, 4000
    below = 0
    for _ in range(sets):
        positive = rng.beta(5, 2, num_positive).round(digits)
        scores = np.concatenate([positive, rng.beta(2, 5, 60).round(digits)])
        choice = choose_for_recall(scores, np.arange(len(scores)) < num_positive, wish)
        recall = (rng.beta(5, 2, fresh).round(digits) >= choice.threshold).mean()
        below += recall < choice.bound - 1e-12
    # 5 %, 3 standard errors of 2,000 sets, and the noise of the fresh rows
    assert below / sets <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / sets) + 0.005
