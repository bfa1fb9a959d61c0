"""Intervals of rates against SciPy's, and how often they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from featcache.errors import DataError
from featcache.metrics.rates import (
    count_groups,
    grouped_rate_interval,
    lower_bound,
    mean_rate_interval,
    rate_interval,
)


@pytest.mark.parametrize("total", [1, 2, 13, 40, 1000])
@pytest.mark.parametrize("method", ["wilson", "exact"])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_are_scipys(total: int, method: str, confidence: float) -> None:
    for hits in range(0, total + 1, math.ceil(total / 40)):
        theirs = stats.binomtest(hits, total).proportion_ci(confidence, method)
        found = rate_interval(hits, total, method=method, confidence=confidence)
        assert found == pytest.approx((theirs.low, theirs.high), abs=1e-9)
        one_sided = stats.binomtest(hits, total, alternative="greater").proportion_ci(confidence)
        assert lower_bound(hits, total, confidence) == pytest.approx(one_sided.low, abs=1e-9)


def test_thirteen_of_thirteen() -> None:
    assert rate_interval(13, 13, method="exact") == pytest.approx((0.753, 1.0), abs=5e-4)
    assert rate_interval(13, 13) == pytest.approx((0.772, 1.0), abs=5e-4)
    assert lower_bound(13, 13) == pytest.approx(0.794, abs=5e-4)


def test_groups_of_one_row_are_no_groups() -> None:
    is_hit = np.arange(30) % 4 > 0
    names = [f"p{i}" for i in range(30)]
    assert grouped_rate_interval(is_hit, names) == rate_interval(int(is_hit.sum()), 30)
    assert grouped_rate_interval(is_hit, [""] * 30) == rate_interval(int(is_hit.sum()), 30)
    assert (count_groups(names), count_groups([""] * 30), count_groups(["a", "", "a"])) == (
        30,
        30,
        2,
    )


def test_groups_that_agree_count_once() -> None:
    """Korn's and Graubard's formula, by SciPy's distributions, of 200 answers given five times."""
    of_groups = np.arange(200) % 5 > 0
    names = [f"p{i}" for i in range(200) for _ in range(5)]
    found = grouped_rate_interval(of_groups.repeat(5), names)
    t_rows, t_groups = stats.t.ppf(0.975, [999, 199])
    effective = 0.8 * 0.2 / (of_groups.var(ddof=1) / 200) * (t_rows / t_groups) ** 2
    yes, no = 0.8 * effective, 0.2 * effective
    expected = stats.beta.ppf(0.025, yes, no + 1), stats.beta.ppf(0.975, yes + 1, no)
    assert found == pytest.approx(expected, abs=1e-9)
    of_200, of_1000 = (rate_interval(0.8 * n, n, method="exact") for n in (200, 1000))
    assert found == pytest.approx(of_200, abs=2e-3)
    assert found[0] < of_200[0] < of_1000[0] < of_1000[1] < of_200[1] < found[1]


@pytest.mark.parametrize("answer", [True, False])
def test_all_or_none_have_as_many_rows_as_groups(answer: bool) -> None:
    is_hit, names = np.full(12, answer), ["a", "b", "c"] * 4
    assert grouped_rate_interval(is_hit, names) == rate_interval(3 * answer, 3, method="exact")
    alone = rate_interval(answer, 1, method="exact")
    assert grouped_rate_interval(is_hit, ["a"] * 12) == alone


def test_groups_that_differ_by_nothing_are_no_more_than_the_rows() -> None:
    is_hit = np.tile([True, False], 30)
    names = [f"p{i}" for i in range(30) for _ in range(2)]  # each group has one of both
    low, high = grouped_rate_interval(is_hit, names)
    assert low < 0.5 < high
    assert high - low >= np.subtract(*rate_interval(30, 60)[::-1]) - 1e-12


def test_a_group_of_its_own_has_no_interval_of_width_zero() -> None:
    low, high = grouped_rate_interval(np.array([True, False] * 4), ["one"] * 8)
    assert high - low > 0.5


def test_the_mean_of_rates_by_hand() -> None:
    intervals = [(0.6, 0.9), (0.85, 1.0)]
    found = mean_rate_interval([0.8, 0.95], intervals)
    below, above = math.hypot(0.2, 0.1) / 2, math.hypot(0.1, 0.05) / 2
    assert found == pytest.approx((0.875 - below, 0.875 + above))
    assert mean_rate_interval([1.0, 1.0], [(0.8, 1.0), (0.7, 1.0)])[1] == 1.0


@pytest.mark.parametrize("rate", [0.8, 0.9, 0.95, 0.98])
def test_exact_intervals_hold_as_promised(rate: float) -> None:
    """By the binomial distribution itself: nothing is drawn."""
    for total in (13, 40, 200):
        hits = np.arange(total + 1)
        weights = stats.binom.pmf(hits, total, rate)
        two_sided = [rate_interval(k, total, method="exact") for k in hits.tolist()]
        holds = [low <= rate <= high for low, high in two_sided]
        assert weights @ holds >= 0.95 - 1e-12
        bounds = [lower_bound(k, total) <= rate for k in hits.tolist()]
        assert weights @ bounds >= 0.95 - 1e-12


@pytest.mark.parametrize("rate", [0.85, 0.95])
def test_intervals_of_groups_hold_where_independent_ones_do_not(rate: float) -> None:
    """1,000 sets of 70 patients with 1 to 5 images, whose answers go together."""
    random, sets, num_patients = np.random.default_rng(0), 1_000, 70
    holds, holds_alone = 0, 0
    for _ in range(sets):
        sizes = random.integers(1, 6, num_patients)
        of_patients = random.beta(rate * 0.2, (1 - rate) * 0.2, num_patients).repeat(sizes)
        is_hit = random.random(len(of_patients)) < of_patients
        names = [str(i) for i in np.arange(num_patients).repeat(sizes)]
        low, high = grouped_rate_interval(is_hit, names)
        holds += low <= rate <= high
        low, high = rate_interval(int(is_hit.sum()), len(is_hit))
        holds_alone += low <= rate <= high
    assert holds / sets >= 0.93
    assert holds_alone / sets < 0.9


@pytest.mark.parametrize(("hits", "total"), [(1, 0), (-1, 4), (5, 4), (float("nan"), 4)])
def test_what_is_no_rate_is_refused(hits: float, total: int) -> None:
    with pytest.raises(DataError, match="hits: expected 0 to the number of rows"):
        rate_interval(hits, total)
