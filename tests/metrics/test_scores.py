from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from featcache.errors import ConfigError, DataError
from featcache.metrics.scores import compute_metrics, compute_score


def random_case(seed: int, num_rows: int, num_classes: int, digits: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, num_classes, num_rows)
    targets[:num_classes] = np.arange(num_classes)
    logits = rng.normal(size=(num_rows, num_classes)) + np.eye(num_classes)[targets]
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return targets, probs.round(digits)  # rounding makes ties


def auc_by_ranks(positive: Any, score: Any) -> float:
    """Share of (positive, negative) pairs in the right order, ties counting half."""
    above = score[positive][:, None] - score[~positive][None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def average_precision_by_steps(positive: Any, score: Any) -> float:
    """Sum over thresholds of precision times the gain in recall."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        chosen = score >= threshold
        recall = positive[chosen].sum() / positive.sum()
        total += (recall - recall_before) * positive[chosen].mean()
        recall_before = recall
    return total


@pytest.mark.parametrize(("num_classes", "digits"), [(2, 8), (2, 1), (4, 1), (30, 3)])
def test_figures_equal_scikit_learns(num_classes: int, digits: int) -> None:
    for seed in range(5):
        targets, probs = random_case(seed, 200, num_classes, digits)
        classes, preds = [str(i) for i in range(num_classes)], probs.argmax(1)
        found = compute_metrics(targets, probs, classes)
        figures = metrics.precision_recall_fscore_support(
            targets, preds, labels=range(num_classes), zero_division=np.nan
        )
        for i, row in enumerate(found["per_class"].values()):
            for key, values in zip(("precision", "recall", "f1"), figures, strict=False):
                wanted = None if np.isnan(values[i]) else pytest.approx(values[i], abs=1e-12)
                assert row[key] == wanted, key
            is_class, of_class = targets == i, probs[:, i]
            assert row["roc_auc"] == pytest.approx(
                metrics.roc_auc_score(is_class, of_class), abs=1e-12
            )
            assert row["average_precision"] == pytest.approx(
                metrics.average_precision_score(is_class, of_class), abs=1e-12
            )
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(targets, preds))
        assert found["confusion_matrix"] == metrics.confusion_matrix(targets, preds).tolist()
        assert compute_score("f1", targets, probs, classes) == pytest.approx(
            metrics.f1_score(targets, preds, average="macro", zero_division=np.nan)
        )


@pytest.mark.parametrize(("num_classes", "digits"), [(2, 8), (2, 1), (3, 8), (5, 2)])
def test_figures_equal_independent_formulas(num_classes: int, digits: int) -> None:
    for seed in range(5):
        targets, probs = random_case(seed, 60, num_classes, digits)
        classes = [f"class {i}" for i in range(num_classes)]
        found = compute_metrics(targets, probs, classes)
        preds = np.array([row.tolist().index(max(row)) for row in probs])

        confusion = np.zeros((num_classes, num_classes), int)
        for target, pred in zip(targets, preds, strict=True):
            confusion[target, pred] += 1
        assert found["confusion_matrix"] == confusion.tolist()
        recalls = np.diag(confusion) / confusion.sum(1)
        assert found["accuracy"] == pytest.approx((preds == targets).mean(), abs=1e-12)
        assert found["balanced_accuracy"] == pytest.approx(recalls.mean(), abs=1e-12)
        one_vs_rest = [(targets == i, probs[:, i]) for i in range(num_classes)]
        assert found["roc_auc"] == pytest.approx(
            np.mean([auc_by_ranks(*case) for case in one_vs_rest]), abs=1e-12
        )
        assert found["average_precision"] == pytest.approx(
            np.mean([average_precision_by_steps(*case) for case in one_vs_rest]), abs=1e-12
        )
        for i, name in enumerate(classes):
            row = found["per_class"][name]
            hits, chosen, rows = confusion[i, i], confusion[:, i].sum(), confusion[i].sum()
            assert row["num_samples"] == rows
            assert row["recall"] == pytest.approx(hits / rows)
            assert row["precision"] == (pytest.approx(hits / chosen) if chosen else None)
            assert row["f1"] == pytest.approx(2 * hits / (chosen + rows))


def test_positive_class_names_sensitivity_and_specificity() -> None:
    targets = np.array([0, 0, 0, 1, 1, 1, 1])
    probs = np.eye(2)[[0, 0, 1, 1, 1, 1, 0]]
    covid = compute_metrics(targets, probs, ["covid", "normal"], "covid")
    assert (covid["positive"], covid["sensitivity"], covid["specificity"]) == ("covid", 2 / 3, 0.75)
    normal = compute_metrics(targets, probs, ["covid", "normal"], "normal")
    assert (normal["sensitivity"], normal["specificity"]) == (0.75, 2 / 3)
    unnamed = compute_metrics(targets, probs, ["covid", "normal"])
    keys = ("positive", "sensitivity", "specificity", "positive_roc_auc")
    assert [unnamed[key] for key in keys] == [None] * 4


@pytest.mark.parametrize("num_classes", [2, 3, 6])
@pytest.mark.parametrize("wanted", [0, 1])
def test_a_positive_class_is_measured_against_the_rest(num_classes: int, wanted: int) -> None:
    """Of any number of classes, as two: the means over the classes stay what they are."""
    targets, probs = random_case(4, 50, num_classes, 2)
    classes = [f"class {i}" for i in range(num_classes)]
    found = compute_metrics(targets, probs, classes, classes[wanted])
    is_class, preds = targets == wanted, probs.argmax(1)
    assert found["sensitivity"] == pytest.approx((preds[is_class] == wanted).mean())
    assert found["specificity"] == pytest.approx((preds[~is_class] != wanted).mean())
    auc = auc_by_ranks(is_class, probs[:, wanted])
    precision = average_precision_by_steps(is_class, probs[:, wanted])
    row = found["per_class"][classes[wanted]]
    for key, value in (("roc_auc", auc), ("average_precision", precision)):
        assert found[f"positive_{key}"] == row[key] == pytest.approx(value, abs=1e-12)
        assert row[key] == compute_score(key, targets, probs, classes, classes[wanted])
        assert found[key] == pytest.approx(
            np.mean([of_class[key] for of_class in found["per_class"].values()])
        )
        assert found[key] == compute_metrics(targets, probs, classes)[key]
    assert num_classes == 2 or found["average_precision"] != found["positive_average_precision"]


def test_a_positive_class_of_several_labels_leaves_unknown_targets_out() -> None:
    rng = np.random.default_rng(3)
    targets = rng.integers(0, 2, (60, 3)).astype(np.float32)
    targets[rng.random((60, 3)) < 0.3] = np.nan
    probs = rng.random((60, 3)).round(2)
    found = compute_metrics(targets, probs, ["a", "b", "c"], "b")
    known = ~np.isnan(targets[:, 1])
    is_yes, score = targets[known, 1] == 1, probs[known, 1]
    assert found["sensitivity"] == pytest.approx((score[is_yes] > 0.5).mean())
    assert found["specificity"] == pytest.approx((score[~is_yes] <= 0.5).mean())
    assert found["positive_roc_auc"] == pytest.approx(auc_by_ranks(is_yes, score))
    precision = average_precision_by_steps(is_yes, score)
    assert found["positive_average_precision"] == pytest.approx(precision)
    one_sided = compute_metrics(np.ones((4, 1)), probs[:4, :1], ["a"], "a")
    assert (one_sided["specificity"], one_sided["positive_roc_auc"]) == (None, None)


def test_undefined_figures_are_null_and_nothing_warns() -> None:
    targets, probs = np.array([0, 0, 1]), np.eye(3)[[0, 0, 0]]
    found = compute_metrics(targets, probs, ["a", "b", "c"])
    assert found["per_class"]["a"]["precision"] == pytest.approx(2 / 3)
    assert found["per_class"]["b"] == {
        "precision": None, "recall": 0.0, "f1": 0.0, "roc_auc": 0.5,
        "average_precision": pytest.approx(1 / 3), "num_samples": 1,
    }  # fmt: skip
    assert found["per_class"]["c"] == {
        "precision": None, "recall": None, "f1": None, "roc_auc": None,
        "average_precision": None, "num_samples": 0,
    }  # fmt: skip
    assert found["balanced_accuracy"] == 0.5
    assert found["roc_auc"] is None
    assert found["average_precision"] is None
    json.dumps(found, allow_nan=False)


def test_rows_of_one_class_only() -> None:
    one = compute_metrics(np.array([1, 1]), np.eye(2)[[1, 0]], ["a", "b"], "a")
    assert (one["accuracy"], one["roc_auc"], one["sensitivity"]) == (0.5, None, None)
    assert (one["balanced_accuracy"], one["specificity"]) == (0.5, 0.5)
    json.dumps(one, allow_nan=False)


@pytest.mark.parametrize(
    ("targets", "probs", "what"),
    [
        ([0, 1], np.full((2, 2), np.nan), "found NaN"),
        ([0, 1], np.full((2, 3), 0.5), "found shape"),
        ([0, -1], np.full((2, 2), 0.5), "found -1 to 0"),
        ([0, 2], np.full((2, 2), 0.5), "found 0 to 2"),
        ([], np.zeros((0, 2)), "found none"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(targets: list[int], probs: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        compute_metrics(np.array(targets), probs, ["a", "b"])


def test_unknown_positive_class_is_refused_with_the_classes() -> None:
    with pytest.raises(ConfigError, match="expected one of covid, normal, found COVID"):
        compute_metrics(np.array([0, 1]), np.eye(2), ["covid", "normal"], "COVID")


def test_f1_of_a_class_without_rows_is_undefined_whatever_is_predicted() -> None:
    """It was 0 for a head that predicts the class, and None for one that does not."""
    targets = np.ones(4, int)
    for probs in (np.tile([0.9, 0.1], (4, 1)), np.tile([0.1, 0.9], (4, 1))):
        assert compute_score("f1", targets, probs, ["a", "b"]) is None
        assert compute_score("f1", targets, probs, ["a", "b"], "a") is None
    assert compute_score("f1", targets, probs, ["a", "b"], "b") == 1.0
