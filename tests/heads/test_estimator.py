"""HeadClassifier: what scikit-learn expects of a classifier, and what ``featcache.train`` gives."""

from __future__ import annotations

import copy
import csv
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

from featcache import HeadClassifier, load_run, open_cache, predict, train, write_cache
from featcache.cache.reading import Cache

SMALL: dict[str, Any] = {
    "hidden_layer_sizes": (8,), "max_epochs": 4, "learning_rate": 0.02, "device": "cpu",
    "random_state": 0,
}  # fmt: skip
NAMES = np.array(["covid", "normal", "viral"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Heads this small only wait for each other on more threads, and long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(**change: Any) -> HeadClassifier:
    return HeadClassifier(**(SMALL | change))


def blobs(
    num_rows: int = 70, num_classes: int = 2, dtype: str = "f4", seed: int = 0
) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    targets = np.arange(num_rows) % num_classes
    features = rng.normal(size=(num_rows, 12)).astype(dtype)
    features[np.arange(num_rows), targets] += 3
    return features, targets


def make_cache(path: Path, dtype: str = "f4") -> Cache:
    """Three classes; two rows a patient."""
    sizes = {"train": 90, "valid": 45, "test": 30}
    rows = {name: blobs(n, 3, dtype, seed=n) for name, n in sizes.items()}
    return write_cache(
        path, {name: x for name, (x, _) in rows.items()},
        {name: y for name, (_, y) in rows.items()},
        {name: [f"{name}/{i:03d}.png" for i in range(n)] for name, n in sizes.items()},
        classes=NAMES.tolist(),
        groups={name: [f"{name} {i // 2}" for i in range(n)] for name, n in sizes.items()},
    )  # fmt: skip


def same(one: HeadClassifier, two: HeadClassifier) -> bool:
    states = one.head_.state_dict(), two.head_.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(np.array_equal(value, states[1][name]) for name, value in states[0].items())


# --- scikit-learn's own checks


@estimator_checks.parametrize_with_checks(
    [small(max_epochs=6, batch_size=64, learning_rate=0.1, dropout=0.0)],
    expected_failed_checks=lambda _: {
        "check_sample_weight_equivalence_on_dense_data": (
            "batch norm sees a row of weight 2 once, a repeated row twice; batches differ too"
        )
    },
)
def test_what_scikit_learn_expects(estimator: HeadClassifier, check: Any) -> None:
    check(estimator)


def test_rows_of_the_default_head_do_not_depend_on_their_company() -> None:
    """In float32 they do, by 6e-7: more than scikit-learn allows."""
    estimator_checks.check_methods_subset_invariance(
        "HeadClassifier", HeadClassifier(max_epochs=2, learning_rate=0.05, device="cpu")
    )


def test_a_classifier_by_its_tags_and_its_clone() -> None:
    estimator = small(class_weight={"a": 2})
    assert is_classifier(estimator)
    assert clone(estimator).get_params() == estimator.get_params()
    defaults = HeadClassifier().get_params()
    wanted = {
        "hidden_layer_sizes": (512, 128), "dropout": 0.4, "learning_rate": 5e-4,
        "batch_size": "auto", "max_epochs": 10, "validation_fraction": 0, "class_weight": None,
        "random_state": None, "device": "auto", "verbose": 0,
    }  # fmt: skip
    assert wanted.items() <= defaults.items()


# --- equal to train


@pytest.mark.parametrize(
    ("dtype", "parameters", "options"),
    [
        ("f4", {}, {}),
        ("f2", {"class_weight": "balanced", "label_smoothing": 0.1},
         {"class_weights": "balanced", "label_smoothing": 0.1}),
        ("f4", {"solver": "adamw", "weight_decay": 0.1, "schedule": "cosine", "batch_size": 16,
                "dropout": 0.2, "hidden_layer_sizes": [16, 8]},
         {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "batch_size": 16,
          "dropout": 0.2, "hidden": [16, 8]}),
        ("f4", {"learning_rate": 0.5, "n_iter_no_change": 1, "max_epochs": 30, "solver": "sgd"},
         {"learning_rate": 0.5, "patience": 1, "epochs": 30, "optimizer": "sgd"}),
    ],
)  # fmt: skip
def test_weights_and_history_equal_those_of_train(
    tmp_path: Path, dtype: str, parameters: Any, options: Any
) -> None:
    cache = make_cache(tmp_path / "c.h5", dtype)
    rows, valid, test = (cache.split(name) for name in ("train", "valid", "test"))
    assert not rows.features.flags.writeable
    options = {"hidden": (8,), "epochs": 4, "learning_rate": 0.02, "device": "cpu"} | options
    train(cache.path, tmp_path / "run", seed=7, **options)
    run = load_run(tmp_path / "run")
    fitted = small(random_state=7, **parameters).fit(
        rows.features, NAMES[rows.targets], X_val=valid.features, y_val=NAMES[valid.targets]
    )
    state = fitted.head_.state_dict()
    assert set(state) == set(run.state)
    assert all(np.array_equal(state[name], run.state[name]) for name in state)
    assert fitted.best_epoch_ == run.training["best_epoch"]
    with (tmp_path / "run" / "history.csv").open(newline="") as file:
        history = list(csv.DictReader(file))
    assert list(history[0]) == list(fitted.history_[0])
    for name in ("valid_loss", "valid_recall_viral"):
        assert [row[name] for row in history] == [str(row[name]) for row in fitted.history_]
    predictions = predict(tmp_path / "run", cache=cache.path)
    probs = predictions.probs[[path.startswith("test/") for path in predictions.paths]]
    np.testing.assert_allclose(fitted.predict_proba(test.features), probs, atol=2e-6)
    assert fitted.classes_.tolist() == list(cache.classes)


def test_without_validation_rows_the_last_epoch_is_kept() -> None:
    features, targets = blobs()
    fitted = small(learning_rate=0.3, max_epochs=5).fit(features, targets)
    held = small(learning_rate=0.3, max_epochs=5).fit(
        features,
        targets,
        X_val=features[:5],
        y_val=1 - targets[:5],  # gets worse as it learns
    )
    assert (fitted.best_epoch_, fitted.n_iter_, len(fitted.history_)) == (5, 5, 5)
    assert held.best_epoch_ < 5
    assert not same(fitted, held)
    assert [r["train_loss"] for r in held.history_] == [r["train_loss"] for r in fitted.history_]
    assert "valid_loss" not in fitted.history_[0]


# --- validation rows


def test_a_held_out_share_chooses_the_epoch() -> None:
    features, targets = blobs(100)
    targets[::5] = 1 - targets[::5]  # mistakes in the targets: the longer, the worse
    options = {"learning_rate": 0.1, "max_epochs": 20, "validation_fraction": 0.3}
    fitted = small(**options).fit(features, targets)
    losses = [row["valid_loss"] for row in fitted.history_]
    assert fitted.best_epoch_ == 1 + int(np.argmin(losses)) < 20
    again = small(**options, n_iter_no_change=3).fit(features, targets)
    assert again.best_epoch_ + 3 == again.n_iter_ < 20
    assert [row["valid_loss"] for row in again.history_] == losses[: again.n_iter_]


def test_the_held_out_share_is_stratified_and_kept_from_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from featcache.heads import estimator

    seen: list[Any] = []

    def watch(*arrays: Any, **keywords: Any) -> Any:
        seen.append((arrays, keywords))
        return fit_head(*arrays, **keywords)

    fit_head = estimator.fit_head
    monkeypatch.setattr(estimator, "fit_head", watch)
    features, targets = blobs(80)
    features[:, 11] = np.arange(80)  # names its row
    weights = np.arange(80) + 1.0
    small(validation_fraction=0.25).fit(features, targets, weights)
    (_, _, rows, y, held_rows, held_y), keywords = seen[0]
    assert sorted([*rows[:, 11], *held_rows[:, 11]]) == list(range(80))
    assert (np.bincount(y).tolist(), np.bincount(held_y).tolist()) == ([30, 30], [10, 10])
    assert (y == rows[:, 11] % 2).all()
    np.testing.assert_allclose(keywords["train_weights"], (rows[:, 11] + 1) / 80, rtol=1e-6)


@pytest.mark.parametrize("fraction", [1, 1.0, -0.1, 5, "half", True])
def test_shares_that_are_none_are_refused(fraction: Any) -> None:
    with pytest.raises(ValueError, match="validation_fraction: expected a number from 0 to below"):
        small(validation_fraction=fraction).fit(*blobs())


def test_validation_rows_that_do_not_fit_are_refused() -> None:
    features, targets = blobs()
    for change, message in (
        ({"X_val": features}, "go together"),
        ({"y_val": targets}, "go together"),
        ({"X_val": features[:, :5], "y_val": targets}, "5 features, but HeadClassifier is expect"),
        ({"X_val": features, "y_val": targets + 1}, "previously unseen labels"),
        ({"X_val": features, "y_val": targets[:5]}, "validation rows: expected features"),
    ):
        with pytest.raises(ValueError, match=message):
            small().fit(features, targets, **change)
    with pytest.raises(ValueError, match="with validation_fraction=0"):
        small(validation_fraction=0.5).fit(features, targets, X_val=features, y_val=targets)


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


# --- in scikit-learn's company


def test_pickles_predict_the_same() -> None:
    features, targets = blobs()
    fitted = small().fit(features, NAMES[targets])
    again = pickle.loads(pickle.dumps(fitted))
    assert same(fitted, again)
    np.testing.assert_array_equal(again.predict_proba(features), fitted.predict_proba(features))


def test_cross_validation_on_a_cache_keeps_groups_together(tmp_path: Path) -> None:
    rows = open_cache(make_cache(tmp_path / "c.h5").path).splits["train"]
    model = make_pipeline(StandardScaler(), small(max_epochs=15))
    folds = GroupKFold(3)
    scores = cross_val_score(model, rows.features, rows.targets, groups=rows.groups, cv=folds)
    assert scores.min() > 0.75
    tensors = torch.from_numpy(rows.features.copy()), torch.from_numpy(rows.targets.copy())
    again = cross_val_score(
        small(max_epochs=15), *tensors, groups=rows.groups, cv=folds, error_score="raise"
    )
    assert again.min() > 0.75
    noise = cross_val_score(
        model, rows.features, np.random.default_rng(0).permutation(rows.targets),
        groups=rows.groups, cv=folds,
    )  # fmt: skip
    assert noise.mean() < 0.55


def test_a_grid_search_finds_what_learns() -> None:
    features, targets = blobs(90, 3)
    grid = {
        "learning_rate": np.array([1e-7, 0.05]), "hidden_layer_sizes": [(), (8,)],
        "batch_size": np.array([16]),
    }  # fmt: skip
    search = GridSearchCV(small(), grid, cv=2, error_score="raise", scoring="neg_log_loss")
    search.fit(features, NAMES[targets], sample_weight=np.ones(90))
    assert search.best_params_["learning_rate"] == 0.05
    assert search.best_estimator_.score(features, NAMES[targets]) > 0.8


@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
def test_calibration(method: str) -> None:
    features, targets = blobs(90, 3)
    calibrated = CalibratedClassifierCV(small(max_epochs=15), method=method, cv=3)
    calibrated.fit(features, NAMES[targets], sample_weight=np.ones(90))
    assert calibrated.score(features, NAMES[targets]) > 0.8
    np.testing.assert_allclose(calibrated.predict_proba(features).sum(1), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_head_from_the_gpu_is_pickled_for_any_machine() -> None:
    features, targets = blobs()
    fitted = small(device="cuda", dropout=0.0).fit(features, targets)
    probs = fitted.predict_proba(features)
    assert {value.device.type for value in fitted.head_.state_dict().values()} == {"cpu"}
    again = pickle.loads(pickle.dumps(fitted)).set_params(device="cpu")
    np.testing.assert_allclose(again.predict_proba(features), probs, atol=1e-9)
