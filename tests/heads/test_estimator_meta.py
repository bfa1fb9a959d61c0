"""HeadClassifier in scikit-learn's estimators that fit others: thresholds, calibration, folds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sample_estimators import NAMES, blobs, small
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, make_scorer, recall_score
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GroupKFold,
    TunedThresholdClassifierCV,
    cross_val_predict,
)


def noisy(num_rows: int = 120, num_classes: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """Classes that overlap, so that thresholds and calibration have something to do."""
    features, targets = blobs(num_rows, num_classes, seed=seed)
    features += 2 * np.random.default_rng(seed + 1).normal(size=features.shape).astype("f4")
    return features, NAMES[targets]


# scikit-learn tells a function to find a threshold by the order of its scores.
FINDS = make_scorer(recall_score, pos_label="covid")


@pytest.mark.parametrize("method", ["predict_proba", "decision_function", "predict"])
def test_out_of_fold_predictions_are_those_of_heads_without_the_fold(method: str) -> None:
    features, targets = noisy(num_classes=3)
    groups, folds = np.arange(120) // 4, GroupKFold(4)
    found = cross_val_predict(small(), features, targets, groups=groups, cv=folds, method=method)
    for train, test in folds.split(features, targets, groups):
        head = small().fit(features[train], targets[train])
        assert np.array_equal(found[test], getattr(head, method)(features[test]))


def test_a_tuned_threshold_is_the_best_on_the_fold_and_decides() -> None:
    features, targets = noisy()
    tuned = TunedThresholdClassifierCV(
        small(max_epochs=8), scoring="balanced_accuracy", cv=3, store_cv_results=True,
        response_method="predict_proba",
    ).fit(features, targets)  # fmt: skip
    assert 0 < tuned.best_threshold_ < 1
    scores = tuned.cv_results_["scores"]
    assert tuned.best_score_ == scores.max()
    alone = small(max_epochs=8).fit(features, targets)
    probs = alone.predict_proba(features)[:, 1]
    assert np.array_equal(tuned.predict_proba(features)[:, 1], probs)
    wanted = NAMES[(probs >= tuned.best_threshold_).astype(int)]
    assert np.array_equal(tuned.predict(features), wanted)


def test_a_threshold_for_the_positive_class_of_a_fitted_head() -> None:
    """On rows that the head has not seen, with the head as it is."""
    features, targets = noisy(240)
    head = small(max_epochs=8).fit(features[:120], targets[:120])
    states = {name: value.clone() for name, value in head.head_.state_dict().items()}
    rest, truth = features[120:], targets[120:]
    tuned = TunedThresholdClassifierCV(
        head, scoring=FINDS, cv="prefit", refit=False, response_method="predict_proba",
    ).fit(rest, truth)  # fmt: skip
    assert all(np.array_equal(v, states[n]) for n, v in tuned.estimator_.head_.state_dict().items())
    fixed = FixedThresholdClassifier(
        FrozenEstimator(head), threshold=tuned.best_threshold_, pos_label="covid",
        response_method="predict_proba",
    ).fit(rest, truth)  # fmt: skip
    assert np.array_equal(fixed.predict(rest), tuned.predict(rest))
    found = recall_score(truth, tuned.predict(rest), pos_label="covid")
    assert found >= recall_score(truth, head.predict(rest), pos_label="covid")


@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
def test_calibration_by_folds(method: str, ensemble: bool) -> None:
    features, targets = noisy(150, 3)
    calibrated = CalibratedClassifierCV(
        small(max_epochs=8), method=method, cv=3, ensemble=ensemble
    ).fit(features, targets)
    assert len(calibrated.calibrated_classifiers_) == (3 if ensemble else 1)
    fresh, truth = noisy(150, 3, seed=5)
    probs = calibrated.predict_proba(fresh)
    assert probs.shape == (150, 3)
    np.testing.assert_allclose(probs.sum(1), 1)
    assert list(calibrated.classes_) == list(NAMES)
    assert calibrated.score(fresh, truth) > 0.5


def test_calibration_of_a_fitted_head_is_platts_of_its_scores() -> None:
    features, targets = noisy(240)
    head = small(max_epochs=20, dropout=0.0).fit(features[:120], targets[:120])
    rest, truth = features[120:], targets[120:]
    calibrated = CalibratedClassifierCV(FrozenEstimator(head), method="sigmoid").fit(rest, truth)
    probs = calibrated.predict_proba(rest)
    scores, before = head.decision_function(rest), head.predict_proba(rest)
    assert np.array_equal(np.argsort(probs[:, 1], kind="stable"), np.argsort(scores, kind="stable"))
    # Platt (1999): targets a little off 0 and 1, here as weights of either answer.
    is_yes = truth == "normal"
    num_yes, num_no = is_yes.sum(), (~is_yes).sum()
    target = np.where(is_yes, (num_yes + 1) / (num_yes + 2), 1 / (num_no + 2))
    platt = LogisticRegression(C=1e9).fit(
        np.tile(scores, 2)[:, None], np.repeat([1, 0], len(scores)),
        np.concatenate([target, 1 - target]),
    )  # fmt: skip
    np.testing.assert_allclose(probs, platt.predict_proba(scores[:, None]), atol=1e-3)
    assert log_loss(truth, probs) < log_loss(truth, before)


def test_clones_inside_keep_the_parameters() -> None:
    tuned = TunedThresholdClassifierCV(small(class_weight="balanced"))
    assert clone(tuned).estimator.get_params() == small(class_weight="balanced").get_params()
    assert tuned.set_params(estimator__dropout=0.1).estimator.dropout == 0.1
