"""The methods that an evaluation names are those that its intervals and tests were made by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featcache.evaluation.comparison import compare_rows
from featcache.evaluation.intervals import BOTH, OF_GROUPS, WILSON, measure_intervals
from featcache.evaluation.predicted_rows import PredictedRows
from featcache.metrics.rates import grouped_rate_interval, rate_interval


def rows_in(groups: list[str]) -> PredictedRows:
    """Return 40 rows of two classes, a quarter of them wrong."""
    targets = np.arange(40) // 20
    of_second = np.where(np.arange(40) % 4 == 0, 1 - targets, targets)
    probs = np.stack([1 - of_second, of_second], axis=1) * 0.8 + 0.1
    return PredictedRows(("a", "b"), [f"{i}.png" for i in range(40)], groups, targets, probs)


PAIRS = [f"p{i // 2}" for i in range(40)]
CASES = [
    ([""] * 40, WILSON),
    ([f"p{i}" for i in range(40)], WILSON),  # a group each, as split names those it has no name for
    (PAIRS, OF_GROUPS),
    ([*PAIRS[:20], *[f"q{i}" for i in range(20)]], BOTH),
    ([f"p{i % 20}" for i in range(40)], BOTH),  # each patient has one image of each class
]


@pytest.mark.parametrize(("groups", "method"), CASES)
def test_method_is_the_one_of_the_numbers(groups: list[str], method: str) -> None:
    facts = measure_intervals(rows_in(groups), "a")
    assert facts["method"] == method
    wilson = {"accuracy": (30, 40), "sensitivity": (15, 20), "specificity": (15, 20)}
    is_wilson = {
        name: facts[name] == pytest.approx(rate_interval(*counts))
        for name, counts in wilson.items()
    }  # fmt: skip
    assert any(is_wilson.values()) is (method in {WILSON, BOTH})
    assert all(is_wilson.values()) is (method == WILSON)
    right: Any = np.arange(40) % 4 != 0
    assert facts["accuracy"] == pytest.approx(grouped_rate_interval(right, groups))


@pytest.mark.parametrize(("groups", "method"), CASES)
def test_test_of_two_runs_is_mcnemars_where_no_two_rows_share_a_group(
    groups: list[str], method: str
) -> None:
    rows = rows_in(groups)
    assert (compare_rows(rows, rows, "other", None)["test"] == "McNemar, exact") is (
        method == WILSON
    )
