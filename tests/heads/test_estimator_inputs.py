"""HeadClassifier: what may be handed to it, its parameters, and weights of rows."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sample_estimators import NAMES, blobs, same, small
from scipy.sparse import csr_array
from sklearn.exceptions import NotFittedError

# --- weights


def test_rows_of_no_weight_are_as_if_absent_and_the_scale_does_not_matter() -> None:
    features, targets = blobs(80)
    weights = np.random.default_rng(0).integers(0, 3, 80).astype(float)
    weights[3] = 1e-300  # nothing in float32
    some = weights > 0.5
    fitted = small().fit(features, targets, weights)
    assert same(fitted, small().fit(features[some], targets[some], weights[some]))
    assert same(fitted, small().fit(features, targets, torch.from_numpy(weights * 8)))
    assert not same(fitted, small().fit(features[some], targets[some]))


def test_equal_weights_are_no_weights() -> None:
    features, targets = blobs()
    one, two = small().fit(features, targets), small().fit(features, targets, np.full(70, 3.0))
    np.testing.assert_allclose(one.predict_proba(features), two.predict_proba(features), atol=1e-5)


def test_class_weights_are_weights_of_rows() -> None:
    features, targets = blobs(70, 3)
    names = NAMES[targets]
    by_dict = small(class_weight={"covid": 2, "viral": 6}).fit(features, names)
    by_row = small().fit(features, names, np.array([2.0, 1.0, 6.0])[targets])
    both = small(class_weight={"covid": 2}).fit(features, names, np.array([1, 1, 6])[targets])
    plain = small().fit(features, names)
    probs = [model.predict_proba(features) for model in (by_dict, by_row, both, plain)]
    np.testing.assert_allclose(probs[1], probs[0], atol=1e-5)
    np.testing.assert_allclose(probs[2], probs[0], atol=1e-5)
    assert abs(probs[3] - probs[0]).max() > 0.01


def test_balanced_weights_are_those_a_dict_names() -> None:
    features, targets = blobs(60)
    targets[:20] = 0
    counts = np.bincount(targets)
    wanted = small(class_weight=dict(enumerate(60 / (2 * counts)))).fit(features, targets)
    assert same(small(class_weight="balanced").fit(features, targets), wanted)


def test_a_class_of_no_weight_is_left_out() -> None:
    features, targets = blobs(70, 3)
    fitted = small(class_weight={1: 0}).fit(features, targets)
    weighed = small().fit(features, targets, targets != 1)
    probs = fitted.predict_proba(features), weighed.predict_proba(features)
    np.testing.assert_allclose(probs[0], probs[1], atol=1e-5)
    with pytest.raises(ValueError, match="only one class: "):
        small(class_weight={1: 0, 0: 0}).fit(features, targets)


def test_weights_without_meaning_are_refused() -> None:
    features, targets = blobs(6)
    for weights, message in (
        (-np.ones(6), "Negative values"),
        (np.ones(5), "sample_weight"),
        (np.zeros(6), "(?i)weight.*zero"),
        ([1, 0, 0, 0, 0, 0], "a weight above zero, 1 have one"),
        ([1, np.nan, 1, 1, 1, 1], "NaN"),
        (targets, "at least 2 classes .* only one class"),
    ):
        with pytest.raises(ValueError, match=message):
            small().fit(features, targets, weights)
    for class_weight in ({0: -1}, "heavy", {7: 1}):
        with pytest.raises(ValueError, match="class_weight"):
            small(class_weight=class_weight).fit(features, targets)


# --- what may be handed over


def test_tensors_lists_and_dtypes_give_the_same_head() -> None:
    features, targets = blobs()
    features = features.astype("f2").astype("f4")
    wanted = small().fit(features, targets)
    for rows in (
        torch.from_numpy(features), torch.from_numpy(features).requires_grad_(),
        torch.from_numpy(features).half(), features.astype("f8"), features.astype("f2"),
        np.asfortranarray(features), features.tolist(),
    ):  # fmt: skip
        for y in (targets, torch.from_numpy(targets), targets.tolist()):
            fitted = small().fit(rows, y)
            assert same(fitted, wanted)
        assert (fitted.predict(rows) == wanted.predict(features)).all()
        assert fitted.score(rows, torch.from_numpy(targets)) == wanted.score(features, targets)
    assert {value.dtype for value in wanted.head_.parameters()} == {torch.float32}
    rough = torch.from_numpy(features).bfloat16()
    assert same(small().fit(rough, targets), small().fit(rough.float(), targets))


def test_arrays_are_not_written_to() -> None:
    features, targets = blobs()
    weights = np.ones(70)
    before = copy.deepcopy((features, targets, weights))
    small().fit(features, targets, weights).predict_proba(features)
    for one, two in zip(before, (features, targets, weights), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "names", [np.array(["b", "a"]), np.array([3, -1]), np.array([True, False]), ["ä", "é"]]
)
def test_targets_of_any_kind_and_their_order(names: Any) -> None:
    features, targets = blobs()
    fitted = small(max_epochs=20).fit(features, np.array(names)[targets])
    assert fitted.classes_.tolist() == sorted(names)
    assert fitted.score(features, np.array(names)[targets]) > 0.9
    probs, margins = fitted.predict_proba(features), fitted.decision_function(features)
    assert probs.shape == (70, 2)
    assert (fitted.predict(features) == fitted.classes_[probs.argmax(1)]).all()
    np.testing.assert_allclose(probs[:, 1], 1 / (1 + np.exp(-margins)), rtol=1e-9)


def test_several_labels_a_row_are_refused_as_scikit_learn_does() -> None:
    features, targets = blobs()
    with pytest.raises(
        ValueError, match=r"y should be a 1d array, got an array of shape \(70, 2\)"
    ):
        small().fit(features, np.eye(2)[targets])


def test_three_classes_have_three_logits() -> None:
    features, targets = blobs(70, 3)
    fitted = small().fit(features, targets)
    logits = fitted.decision_function(features)
    assert logits.shape == (70, 3)
    powers = np.exp(logits)
    np.testing.assert_allclose(
        fitted.predict_proba(features), powers / powers.sum(1, keepdims=True), rtol=1e-9
    )
    with torch.no_grad():
        wanted = fitted.head_(torch.from_numpy(features))
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
    assert not fitted.head_.training


def test_few_rows_and_a_last_batch_of_one() -> None:
    for num_rows in (2, 3, 33, 65):
        features, targets = blobs(num_rows)
        assert small().fit(features, targets).predict(features[:1]).shape == (1,)
    with pytest.raises(ValueError, match="minimum of 2"):
        small().fit(features[:1], targets[:1])


def test_rows_that_are_no_features_are_refused() -> None:
    features, targets = blobs()
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        small().fit(csr_array(features), targets)
    with pytest.raises(TypeError, match="Sparse"):
        small().fit(torch.from_numpy(features).to_sparse(), targets)
    with pytest.raises(ValueError, match="dim 3"):
        small().fit(features[:, None], targets)
    with pytest.raises(ValueError, match="only one class: "):
        small().fit(features, np.zeros(70, int))
    with pytest.raises(ValueError, match="infinity or a value too large"):
        small().fit(features.astype("f8") * 1e200, targets)
    with pytest.raises(NotFittedError):
        small().predict(features)


def test_names_of_columns_are_kept_and_checked() -> None:
    pandas = pytest.importorskip("pandas")
    features, targets = blobs()
    frame = pandas.DataFrame(features, columns=[f"f{i}" for i in range(12)])
    fitted = small().fit(frame, pandas.Series(NAMES[targets]))
    assert fitted.feature_names_in_.tolist() == list(frame)
    assert fitted.n_features_in_ == 12
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(frame[list(frame)[::-1]])


# --- parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_layer_sizes", (0,)), ("hidden_layer_sizes", None), ("dropout", 1.0),
        ("learning_rate", 0), ("batch_size", 1), ("max_epochs", 0), ("n_iter_no_change", 0),
        ("solver", "lbfgs"), ("schedule", "step"), ("weight_decay", -1), ("label_smoothing", 1),
        ("device", "tpu"), ("random_state", -1), ("random_state", "seed"),
    ],
)  # fmt: skip
def test_parameters_without_meaning_are_refused_by_name(name: str, value: Any) -> None:
    words = f"^{name}: expected"
    if name == "random_state":  # scikit-learn's or NumPy's words
        words = "cannot be used to seed|Seed must be"
    with pytest.raises(ValueError, match=words):
        small(**{name: value}).fit(*blobs())


def test_a_loss_that_is_no_number_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"expected a finite loss.*Lower learning_rate"):
        small(learning_rate=1e38, solver="sgd", max_epochs=50).fit(*blobs())


def test_numbers_may_be_numpys_and_one_layer_a_number() -> None:
    given = small(
        hidden_layer_sizes=np.int64(8), learning_rate=np.float32(0.25), max_epochs=np.int64(2),
        batch_size=np.int32(16), dropout=np.float64(0.5), random_state=np.int64(4),
    )  # fmt: skip
    wanted = small(
        hidden_layer_sizes=[8], learning_rate=0.25, max_epochs=2, batch_size=16, dropout=0.5,
        random_state=4,
    )  # fmt: skip
    assert same(given.fit(*blobs()), wanted.fit(*blobs()))


def test_random_state_means_what_it_means_in_scikit_learn() -> None:
    rows = blobs()
    before = torch.get_rng_state()
    assert same(small(random_state=1).fit(*rows), small(random_state=1).fit(*rows))
    assert not same(small(random_state=1).fit(*rows), small(random_state=2).fit(*rows))
    states = [np.random.RandomState(3) for _ in range(2)]
    one, two = (small(random_state=state) for state in states)
    assert same(one.fit(*rows), two.fit(*rows))
    assert not same(one.fit(*rows), copy.deepcopy(one).fit(*rows)), "a RandomState goes on"
    fits = []
    callers = np.random.get_state()  # noqa: NPY002 (None means this one)
    for _ in range(2):
        np.random.seed(5)  # noqa: NPY002
        fits += [small(random_state=None).fit(*rows) for _ in range(2)]
    np.random.set_state(callers)  # noqa: NPY002
    assert same(fits[0], fits[2])
    assert same(fits[1], fits[3])
    assert not same(fits[0], fits[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_verbose_prints_a_line_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    small().fit(*blobs())
    assert capsys.readouterr().out == ""
    small(verbose=1, max_epochs=2).fit(*blobs())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  train loss")[0] for line in lines] == ["epoch   1", "epoch   2"]
    small(verbose=True, max_epochs=1, validation_fraction=0.2).fit(*blobs())
    assert "valid loss" in capsys.readouterr().out
