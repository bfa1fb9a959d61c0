from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn
from scipy.special import softmax
from sklearn.metrics import log_loss

from featcache.errors import DataError
from featcache.metrics.temperature import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    apply_temperature,
    calibrate,
    fit_temperature,
    mean_log_loss,
)


def draw(seed: int, num_rows: int, num_classes: int, sureness: float) -> tuple[Any, Any, Any]:
    """Return logits that are ``sureness`` times too large, targets, and the probabilities."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(num_rows, num_classes)) * 2
    targets = np.array([rng.choice(num_classes, p=row) for row in softmax(true, axis=1)])
    return true * sureness, targets, softmax(true * sureness, axis=1)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("sureness", [0.4, 1.0, 3.0])
def test_it_finds_how_much_too_sure_a_head_is(num_classes: int, sureness: float) -> None:
    logits, targets, probs = draw(1, 4000, num_classes, sureness)
    temperature = fit_temperature(probs, targets)
    assert temperature == pytest.approx(sureness, rel=0.1)
    softened = apply_temperature(probs, temperature)
    np.testing.assert_allclose(softened, softmax(logits / temperature, axis=1), atol=1e-12)
    assert mean_log_loss(softened, targets) == pytest.approx(log_loss(targets, softened))
    for other in (temperature * 0.98, temperature * 1.02):
        assert mean_log_loss(apply_temperature(probs, other), targets) > log_loss(targets, softened)


@pytest.mark.skipif(
    tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8), reason="scikit-learn 1.8 has it"
)
@pytest.mark.parametrize("num_classes", [2, 3])
def test_scikit_learn_finds_the_same(num_classes: int) -> None:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(num_classes)
    targets = np.arange(300) % num_classes
    features = rng.normal(size=(300, 8))
    features[np.arange(300), targets] += 0.7
    head = LogisticRegression(C=100).fit(features[:60], targets[:60])
    theirs = CalibratedClassifierCV(FrozenEstimator(head), method="temperature")
    wanted = theirs.fit(features[60:], targets[60:]).predict_proba(features[60:])
    probs = head.predict_proba(features[60:])
    found = apply_temperature(probs, fit_temperature(probs, targets[60:]))
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_it_helps_where_a_head_is_too_sure_and_not_where_it_is_right() -> None:
    _, targets, probs = draw(2, 300, 2, 3.0)
    sure = calibrate(probs, targets, None)
    assert sure.helps
    assert sure.log_loss_out_of_fold < sure.log_loss - 0.1
    helped = 0
    for seed in range(20):
        _, targets, probs = draw(seed, 60, 2, 1.0)
        helped += calibrate(probs, targets, None).helps
    assert helped < 15  # fitted and judged by the same rows it would help each time


def test_rows_of_a_group_are_in_one_fold() -> None:
    # Each row twice, in a group: with groups nothing may be learnt from the other copy.
    _, targets, probs = draw(3, 40, 2, 1.5)
    twice, names = np.repeat(np.arange(40), 2), [f"g{i // 2}" for i in range(80)]
    grouped = calibrate(probs[twice], targets[twice], names)
    once = calibrate(probs, targets, None)
    assert grouped.log_loss_out_of_fold == pytest.approx(once.log_loss_out_of_fold)
    torn = calibrate(probs[twice], targets[twice], None)
    assert torn.log_loss_out_of_fold != pytest.approx(once.log_loss_out_of_fold)
    one = calibrate(probs, targets, ["a"] * 40)  # no fold to judge by
    assert not one.helps


def test_rows_that_are_all_right_have_no_temperature() -> None:
    # The surer the better, without end: the lowest temperature helps, and would promise 1.
    probs = np.array([[0.9, 0.1], [0.2, 0.8]] * 20)
    found = calibrate(probs, np.array([0, 1] * 20), None)
    assert found.log_loss_out_of_fold < found.log_loss
    assert (found.is_at_limit, found.helps) == (True, False)


def test_extremes() -> None:
    right = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert fit_temperature(right, np.array([0, 1])) == pytest.approx(MIN_TEMPERATURE, rel=1e-3)
    assert fit_temperature(right, np.array([1, 0])) == pytest.approx(MAX_TEMPERATURE, rel=1e-3)
    sure = np.array([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(apply_temperature(sure, 2.0), sure, atol=1e-140)
    assert np.isfinite(mean_log_loss(sure, np.array([1, 0])))
    with pytest.raises(DataError, match="above 0"):
        apply_temperature(right, 0)
