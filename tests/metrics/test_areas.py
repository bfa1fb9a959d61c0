"""Intervals of areas against slow sums over all pairs, and how often they hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from featcache.errors import DataError
from featcache.metrics.areas import auc_interval, compare_auc, mcnemar
from featcache.metrics.rates import rate_interval

Z = NormalDist().inv_cdf(0.975)


def made_up(num_yes: int, num_no: int, shift: float, seed: int) -> tuple[Any, Any]:
    """Rows of both sides in random order, with rounded scores: there are ties."""
    rng = np.random.default_rng(seed)
    is_yes = rng.permutation(np.arange(num_yes + num_no) < num_yes)
    return is_yes, np.round(rng.normal(size=len(is_yes)) + shift * is_yes, 1)


def kernels(is_yes: Any, scores: Any) -> Any:
    """1 for each pair of a yes and a no ranked right, a half for a tie."""
    yes, no = scores[is_yes][:, None], scores[~is_yes][None, :]
    return (yes > no) + 0.5 * (yes == no)


def slow_variance(is_yes: Any, pairs: Any, groups: Any) -> float:
    """Obuchowski's equations of 1997, by loops over groups and over all pairs."""
    num_yes, num_no = pairs.shape
    area = pairs.mean()
    per_yes, per_no = pairs.mean(axis=1), pairs.mean(axis=0)
    of_yes, of_no = np.asarray(groups)[is_yes], np.asarray(groups)[~is_yes]
    sums = {"yes": 0.0, "no": 0.0, "both": 0.0}
    for group in set(groups):
        a = sum(value - area for value in per_yes[of_yes == group])
        b = sum(value - area for value in per_no[of_no == group])
        sums = {"yes": sums["yes"] + a * a, "no": sums["no"] + b * b, "both": sums["both"] + a * b}
    i_yes, i_no, i_all = len(set(of_yes)), len(set(of_no)), len(set(groups))
    s_yes = i_yes / ((i_yes - 1) * num_yes) * sums["yes"]
    s_no = i_no / ((i_no - 1) * num_no) * sums["no"]
    s_both = i_all / (i_all - 1) * sums["both"]
    return float(s_yes / num_yes + s_no / num_no + 2 * s_both / (num_yes * num_no))


def num_units(is_yes: Any, groups: Any) -> int:
    """Groups with a yes or with a no, whichever are fewer."""
    groups = np.asarray(groups)
    return min(len(set(groups[is_yes])), len(set(groups[~is_yes])))


def logit_interval(area: float, variance: float, quantile: float = Z) -> tuple[float, float]:
    odds, half = math.log(area / (1 - area)), quantile * math.sqrt(variance) / (area * (1 - area))
    return 1 / (1 + math.exp(half - odds)), 1 / (1 + math.exp(-half - odds))


@pytest.mark.parametrize(("num_yes", "num_no"), [(30, 30), (20, 90)])
def test_of_single_rows_it_is_delongs_on_the_logit_scale(num_yes: int, num_no: int) -> None:
    is_yes, scores = made_up(num_yes, num_no, 1.0, seed=num_no)
    pairs = kernels(is_yes, scores)
    area = float(roc_auc_score(is_yes, scores))
    variance = pairs.mean(1).var(ddof=1) / num_yes + pairs.mean(0).var(ddof=1) / num_no
    expected = pytest.approx(logit_interval(area, variance), abs=1e-12)
    assert auc_interval(is_yes, scores) == expected
    assert auc_interval(is_yes, scores, groups=[f"p{i}" for i in range(len(is_yes))]) == expected
    assert auc_interval(is_yes, scores, groups=[""] * len(is_yes)) == expected


@pytest.mark.parametrize("mixed", [True, False])
def test_of_groups_it_is_obuchowskis(mixed: bool) -> None:
    is_yes, scores = made_up(60, 90, 1.0, seed=5)
    kinds = np.zeros(150, int) if mixed else is_yes.astype(int)
    names = [f"{kind}-{i % 25}" for i, kind in enumerate(kinds)]
    variance = slow_variance(is_yes, kernels(is_yes, scores), names)
    quantile = stats.t.ppf(0.975, num_units(is_yes, names) - 1)
    expected = logit_interval(float(roc_auc_score(is_yes, scores)), variance, quantile)
    assert auc_interval(is_yes, scores, groups=names) == pytest.approx(expected, abs=1e-12)


def test_rows_that_are_repeated_in_their_group_add_nothing() -> None:
    is_yes, scores = made_up(40, 40, 1.0, seed=1)
    names = [f"p{i}" for i in range(80) for _ in range(4)]
    found = auc_interval(is_yes.repeat(4), scores.repeat(4), groups=names)
    area, quantile = float(roc_auc_score(is_yes, scores)), stats.t.ppf(0.975, 39)
    variance = slow_variance(is_yes, kernels(is_yes, scores), names[::4])
    assert found == pytest.approx(logit_interval(area, variance, quantile), abs=1e-12)
    low, high = auc_interval(is_yes.repeat(4), scores.repeat(4))
    assert found[0] < low < high < found[1]


def test_a_perfect_area_is_a_rate_of_the_rarer_side_or_of_its_groups() -> None:
    is_yes = np.arange(40) < 13
    assert auc_interval(is_yes, is_yes * 1.0) == rate_interval(13, 13)
    assert auc_interval(is_yes, is_yes * -1.0) == rate_interval(0, 13)
    names = [f"p{i // 5}" for i in range(40)]  # three groups with a yes, six with a no
    assert auc_interval(is_yes, is_yes * 1.0, groups=names) == rate_interval(3, 3)
    one = np.arange(9) < 1
    assert auc_interval(one, np.zeros(9)) == rate_interval(0.5, 1)  # one unit has no variance


def test_a_classs_order_and_a_scale_do_not_matter() -> None:
    is_yes, scores = made_up(25, 60, 1.5, seed=3)
    low, high = auc_interval(is_yes, scores)
    assert auc_interval(is_yes, np.exp(scores)) == (low, high)
    assert auc_interval(~is_yes, -scores) == pytest.approx((low, high), abs=1e-12)
    assert auc_interval(is_yes, -scores) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("num_yes", "num_no"), [(20, 20), (10, 150)])
@pytest.mark.parametrize("area", [0.9, 0.97, 0.99])
def test_the_interval_holds_the_area(num_yes: int, num_no: int, area: float) -> None:
    rng, shift = np.random.default_rng(7), math.sqrt(2) * NormalDist().inv_cdf(area)
    is_yes, held = np.arange(num_yes + num_no) < num_yes, 0
    for _ in range(400):
        low, high = auc_interval(is_yes, rng.normal(size=len(is_yes)) + shift * is_yes)
        assert low < high
        held += low <= area <= high
    assert held >= 0.93 * 400


def test_the_interval_of_patients_holds_the_area() -> None:
    """Four images a patient, of which half of the variance is the patient's."""
    rng, area = np.random.default_rng(8), 0.9
    shift = math.sqrt(2) * NormalDist().inv_cdf(area)
    patients = np.arange(40).repeat(4)
    is_yes, names, held = patients < 20, [f"p{i}" for i in patients], np.zeros(2)
    for _ in range(400):
        noise = (rng.normal(size=40)[patients] + rng.normal(size=160)) / math.sqrt(2)
        for i, groups in enumerate((names, None)):
            low, high = auc_interval(is_yes, noise + shift * is_yes, groups=groups)
            held[i] += low <= area <= high
    assert held[0] >= 0.92 * 400
    assert held[1] < 0.9 * 400  # what is lost where groups are forgotten


@pytest.mark.parametrize("grouped", [True, False])
def test_two_areas_are_compared_by_the_variance_of_their_difference(grouped: bool) -> None:
    is_yes, scores = made_up(60, 80, 1.0, seed=11)
    other = np.round(scores + np.random.default_rng(1).normal(size=140), 1)
    names = [f"p{i // 4 if grouped else i}" for i in range(140)]
    pairs = kernels(is_yes, scores) - kernels(is_yes, other)
    error = math.sqrt(slow_variance(is_yes, pairs, names))
    found = compare_auc(is_yes, scores, other, names if grouped else None)
    difference = float(roc_auc_score(is_yes, scores) - roc_auc_score(is_yes, other))
    law = stats.t(num_units(is_yes, names) - 1) if grouped else stats.norm()
    half = law.ppf(0.975) * error
    expected = (difference, difference - half, difference + half)
    assert found[:3] == pytest.approx(expected, abs=1e-12)
    assert found.p_value == pytest.approx(2 * law.sf(abs(difference) / error), abs=1e-12)
    turned = compare_auc(is_yes, other, scores, names if grouped else None)
    assert turned == pytest.approx((-found[0], -found[2], -found[1], found[3]), abs=1e-12)


def test_perfect_areas_differ_by_nothing_that_is_known_exactly() -> None:
    is_yes = np.arange(40) < 20
    same = compare_auc(is_yes, is_yes * 1.0, is_yes * 2.0)
    assert (same.difference, same.p_value) == (0, 1)
    assert same.low < -0.1
    assert same.high > 0.1
    opposite = compare_auc(is_yes, is_yes * 1.0, is_yes * -1.0)
    assert opposite.difference == opposite.high == 1
    assert 0 < opposite.low < 1
    assert 0 < opposite.p_value < 1e-6


def test_the_p_of_heads_that_are_equally_good_is_rarely_small() -> None:
    rng, is_yes = np.random.default_rng(3), np.arange(80) < 40
    small = 0
    for _ in range(400):
        shared = rng.normal(size=80) + 1.5 * is_yes
        small += compare_auc(is_yes, *(shared + rng.normal(size=(2, 80)))).p_value < 0.05
    assert 4 <= small <= 36


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 6), (9, 2), (4, 4), (30, 51)])
def test_mcnemars_is_scipys_binomial_test(only_a: int, only_b: int) -> None:
    a = np.array([True] * only_a + [False] * only_b + [True] * 7 + [False] * 3)
    b = np.array([False] * only_a + [True] * only_b + [True] * 7 + [False] * 3)
    number = only_a + only_b
    expected = stats.binomtest(only_a, number, 0.5).pvalue if number else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, abs=1e-12)


def test_mcnemars_of_groups_is_the_share_of_exchanges_that_lead_by_as_much() -> None:
    """All 4,096 ways to exchange the heads in 12 patients, by going through them."""
    rng = np.random.default_rng(4)
    patients = rng.integers(0, 12, 60)
    a, b = rng.random(60) < 0.8, rng.random(60) < 0.6
    leads = np.array([(a[patients == i].astype(int) - b[patients == i]).sum() for i in range(12)])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 12)).reshape(12, -1)
    expected = (np.abs(leads @ signs) >= abs(leads.sum())).mean()
    names = [f"p{i}" for i in patients]
    assert mcnemar(a, b, names) == mcnemar(b, a, names) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected < 1
    assert mcnemar(a, b, [""] * 60) == mcnemar(a, b) == mcnemar(a, b, [str(i) for i in range(60)])


def test_mcnemars_of_many_groups_is_obuchowskis_chi_square() -> None:
    rng = np.random.default_rng(5)
    names = [f"p{i}" for i in np.arange(8_000).repeat(3)]
    easy, hard = rng.random(8_000).repeat(3) < 0.45, rng.random(8_000).repeat(3) < 0.44
    leads = (easy.astype(int) - hard).reshape(-1, 3).sum(axis=1)
    chi_square = leads.sum() ** 2 / (leads**2).sum()
    expected = stats.chi2.sf(chi_square, 1)
    assert mcnemar(easy, hard, names) == pytest.approx(expected, rel=1e-9)  # beyond the exact
    few = slice(0, 3 * 3_000)
    chi_square = leads[:3_000].sum() ** 2 / (leads[:3_000] ** 2).sum()
    close = stats.chi2.sf(chi_square, 1)
    assert mcnemar(easy[few], hard[few], names[few]) == pytest.approx(close, abs=0.02)


def test_images_that_only_repeat_their_patient_add_nothing() -> None:
    a, b = np.arange(30) < 24, np.arange(30) >= 10
    names = [f"p{i}" for i in range(30) for _ in range(4)]
    assert mcnemar(a.repeat(4), b.repeat(4), names) == pytest.approx(mcnemar(a, b))
    assert mcnemar(a.repeat(4), b.repeat(4)) < mcnemar(a, b)


def test_what_is_no_area_is_refused() -> None:
    yes, scores = np.array([True, False, True]), np.array([0.1, 0.2, 0.3])
    wrong: list[Callable[[], object]] = [
        lambda: auc_interval(np.ones(3, bool), scores),
        lambda: auc_interval(np.zeros(0, bool), np.zeros(0)),
        lambda: auc_interval(yes, np.array([0.1, math.nan, 0.3])),
        lambda: auc_interval(yes, scores[:2]),
        lambda: auc_interval(yes, scores, groups=["a"]),
        lambda: compare_auc(yes, scores, scores[:2]),
        lambda: mcnemar(yes, yes[:2]),
        lambda: mcnemar(yes, yes, ["a"]),
    ]
    for call in wrong:
        with pytest.raises(DataError, match="expected"):
            call()
