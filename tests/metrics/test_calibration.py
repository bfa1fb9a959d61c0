"""Calibration against scikit-learn, MAPIE and sums by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix, log_loss

from featcache.errors import DataError
from featcache.metrics.calibration import (
    NUM_BINS,
    calibration_error,
    decision_curve,
    measure_calibration,
    reliability_table,
)


def made_up(num_classes: int, seed: int = 0, rows: int = 300) -> tuple[Any, Any]:
    """Targets drawn by other probabilities than those that are told."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(num_classes, 0.5), rows)
    told = probs**1.7 / (probs**1.7).sum(axis=1, keepdims=True)
    targets = (probs.cumsum(axis=1) < rng.random(rows)[:, None]).sum(axis=1)
    return targets, told


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_brier_score_and_log_loss_are_scikit_learns(num_classes: int) -> None:
    targets, probs = made_up(num_classes)
    found = measure_calibration(targets, probs, [str(i) for i in range(num_classes)])
    labels = [*range(num_classes)]
    told = probs[:, 1] if num_classes == 2 else probs
    assert found["brier"] == pytest.approx(brier_score_loss(targets, told, labels=labels))
    assert found["log_loss"] == pytest.approx(log_loss(targets, probs, labels=labels))
    assert found["num_bins"] == NUM_BINS


def test_the_table_is_scikit_learns_calibration_curve() -> None:
    targets, probs = made_up(2)
    probs[:3, 1] = [0, 0.2, 1]  # edges belong to the bin below them
    table = reliability_table(targets == 1, probs[:, 1])
    shares, means = calibration_curve(targets, probs[:, 1], n_bins=NUM_BINS)
    assert [row.share_of_yes for row in table] == pytest.approx(shares)
    assert [row.mean_prob for row in table] == pytest.approx(means)
    edges = np.linspace(0, 1, NUM_BINS + 1)
    assert [(row.low, row.high) for row in table] == [*pairwise(edges)]
    inside = (probs[:, 1, None] > edges[:-1]) & (probs[:, 1, None] <= edges[1:])
    inside[probs[:, 1] == 0, 0] = True
    assert [row.num_samples for row in table] == inside.sum(axis=0).tolist()


def test_an_empty_bin_stays_in_the_table() -> None:
    is_yes = np.array([True, False])
    first, second, third, last = reliability_table(is_yes, np.array([0.9, 0.1]), 4)
    assert (first.num_samples, first.mean_prob, first.share_of_yes) == (1, 0.1, 0.0)
    assert second[2:] == third[2:] == (0, None, None)
    assert (last.num_samples, last.mean_prob, last.share_of_yes) == (1, 0.9, 1.0)
    assert calibration_error(is_yes, np.array([0.9, 0.1]), 4) == pytest.approx(0.1)


def test_the_error_is_mapies() -> None:
    calibration = pytest.importorskip("mapie.metrics.calibration")
    targets, probs = made_up(3)
    preds, confidence = probs.argmax(axis=1), probs.max(axis=1)
    for is_yes, told in ((preds == targets, confidence), (targets == 1, probs[:, 1])):
        for bins in (5, NUM_BINS):  # MAPIE counts the edges
            theirs = calibration.expected_calibration_error(
                is_yes.astype(int), told, num_bins=bins + 1, split_strategy="uniform"
            )
            assert calibration_error(is_yes, told, bins) == pytest.approx(theirs)
    found = measure_calibration(targets, probs, ["a", "b", "c"])
    assert found["ece"] == calibration_error(preds == targets, confidence)


def test_labels_count_where_they_are_known() -> None:
    rng = np.random.default_rng(1)
    targets, probs = rng.integers(0, 2, (60, 3)).astype(float), rng.random((60, 3))
    targets[rng.random((60, 3)) < 0.3] = np.nan
    targets[:, 2] = np.nan
    known = ~np.isnan(targets)
    found = measure_calibration(targets, probs, ["a", "b", "c"])
    assert found["brier"] == pytest.approx(brier_score_loss(targets[known], probs[known]))
    assert found["log_loss"] == pytest.approx(log_loss(targets[known], probs[known]))
    errors = [
        calibration_error(targets[known[:, i], i] == 1, probs[known[:, i], i]) for i in (0, 1)
    ]
    assert found["ece"] == pytest.approx(np.mean(errors))


def test_what_a_calibrated_head_has_of_few_rows_is_as_the_docstring_says() -> None:
    rng = np.random.default_rng(2)
    probs = rng.random((400, 100))
    is_yes = rng.random(probs.shape) < probs
    errors = [calibration_error(*pair) for pair in zip(is_yes, probs, strict=True)]
    assert 0.09 < np.mean(errors) < 0.11


def test_net_benefit_is_that_of_the_confusion_matrix() -> None:
    targets, probs = made_up(2)
    told = np.round(probs[:, 1], 2)  # some lie on a threshold: they are positive
    thresholds = [0.0, 0.05, 0.25, 0.5, 0.9]
    for row in decision_curve(targets == 1, told, thresholds):
        (_, false_yes), (_, true_yes) = confusion_matrix(targets, told >= row.threshold)
        odds = row.threshold / (1 - row.threshold)
        assert row.net_benefit == pytest.approx((true_yes - odds * false_yes) / 300)
        share = (targets == 1).mean()
        assert row.treat_all == pytest.approx(share - odds * (1 - share))
    assert decision_curve(targets == 1, targets * 1.0, [0.3])[0].net_benefit == share
    of_all = decision_curve(targets == 1, told, [0.0])[0]
    assert of_all.net_benefit == of_all.treat_all == share


def test_what_is_no_probability_is_refused() -> None:
    yes = np.array([True, False])
    wrong: list[Callable[[], object]] = [
        lambda: reliability_table(yes, np.array([0.1, 1.1])),
        lambda: reliability_table(yes, np.array([0.1, np.nan])),
        lambda: reliability_table(yes, np.array([0.1])),
        lambda: reliability_table(yes[:0], np.zeros(0)),
        lambda: reliability_table(yes, np.zeros(2), 0),
        lambda: decision_curve(yes, np.zeros(2), [1.0]),
        lambda: measure_calibration(np.array([0, 2]), np.full((2, 2), 0.5), ["a", "b"]),
    ]
    for call in wrong:
        with pytest.raises(DataError, match="expected"):
            call()
