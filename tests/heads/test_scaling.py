"""Features of any scale: standardised where batch norm goes wrong, else left alone bit for bit."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_fits import assert_same_weights, blobs, plain_loop, same_states
from sample_fits import fit as fit_blobs
from sample_heads import as_tensors, logits_of

from featcache import HeadClassifier, evaluate, load_run, predict, train, write_cache
from featcache.errors import DataError, FeatcacheWarning
from featcache.heads import fit, one_pass
from featcache.heads.config import FitResult, HeadJob, TrainingConfig
from featcache.heads.fit import fit_head, fit_heads
from featcache.heads.head import HeadConfig, build_head
from featcache.heads.prediction import predict_logits
from featcache.heads.scaling import Columns
from featcache.heads.stack import StackTrainer
from featcache.heads.streaming import StoredFeatures
from featcache.runtime import CPU

HEAD = HeadConfig(12, 2, hidden=(8,))
TRAINING = TrainingConfig(epochs=4, learning_rate=0.01)
ADAM: dict[str, Any] = {"max_epochs": 30}
LBFGS: dict[str, Any] = {"hidden_layer_sizes": (), "solver": "lbfgs"}


def odd_columns(features: Any) -> Any:
    """Return the rows with columns of all scales, one that is far from 0 and one that is still."""
    scales = 10.0 ** np.array([-20, -12, -6, -5, -4, -3, 0, 2, 6, 12, 16, 0])
    moved = features * scales + np.array([0] * 4 + [0.01, 1, 50] + [0] * 5)
    moved[:, 11] = 7
    return moved.astype(features.dtype)


def fit_rows(rows: Any, targets: Any, head: HeadConfig = HEAD, **options: Any) -> FitResult:
    valid = options.pop("valid", blobs(31, seed=1))
    training = TrainingConfig(**({"epochs": 4, "learning_rate": 0.01} | options))
    return fit_head(head, training, rows, targets, *valid, seed=5, data_seed=6, device=CPU)


def score(make: Any, scale: float, mean: float = 0, num_rows: int = 300, **options: Any) -> float:
    """Accuracy on rows like those trained on, mean over three data sets."""
    scores = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(num_rows + 500, 20))
        targets = (features[:, :3].sum(1) > 0).astype(int)
        features = ((features + mean) * scale).astype("f4")
        head = HeadClassifier(random_state=seed, device="cpu", **make, **options)
        head.fit(features[:num_rows], targets[:num_rows])
        scores.append(head.score(features[num_rows:], targets[num_rows:]))
    return float(np.mean(scores))


@functools.cache
def unscaled(solver: str) -> float:
    return score(LBFGS if solver == "lbfgs" else ADAM, 1)


# --- left alone


def test_ordinary_columns_train_as_a_plain_loop() -> None:
    """A spread of 0.03 and more; a column that is always 0, or seldom not, is ordinary too."""
    features, _ = blobs(70)
    assert not Columns.measure(features * 0.03 / features.std(0)).need_scaling(TRAINING)
    features[:, 3] = 0
    features[:, 4] = np.where(np.arange(70) == 5, 0.05, 0)
    assert not Columns.measure(features).need_scaling(TRAINING)
    assert_same_weights(fit_blobs(), plain_loop(), 2e-5)


def test_features_as_a_networks_keep_the_bits_they_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """As EfficientNet-Lite0's on X-rays: some columns are tiny because they are rarely active."""
    rng = np.random.default_rng(0)
    active = rng.random((200, 40)) < np.r_[np.full(8, 0.03), np.full(32, 0.6)]
    features = np.where(active, rng.exponential(0.02, (200, 40)), 0).astype("f4")
    features[:, 8:] *= 20
    assert (Columns.measure(features).spread[:8] < 0.01).all()
    targets, head = np.arange(200) % 2, HeadConfig(40, 2, hidden=(8,))
    options: dict[str, Any] = {"valid": (features[:30], targets[:30]), "epochs": 10}
    found = fit_rows(features, targets, head, **options)
    monkeypatch.setattr(fit, "choose_scalings", lambda *_: [None])
    assert same_states(found, fit_rows(features, targets, head, **options))


# --- set right


@pytest.mark.parametrize("scale", [1e-6, 1e12])
@pytest.mark.parametrize("make", [ADAM, LBFGS], ids=["adam", "lbfgs"])
def test_the_scale_of_features_does_not_matter(make: Any, scale: float) -> None:
    wanted = unscaled("lbfgs" if make is LBFGS else "adam")
    assert wanted > 0.85
    assert score(make, scale) > wanted - 0.03


def test_means_far_from_zero_and_few_rows() -> None:
    wanted = score({}, 1, num_rows=60, learning_rate=0.01)
    assert wanted > 0.75
    for mean, scale in ((2, 1), (20, 1), (-500, 1e-4)):
        found = score({}, scale, mean, num_rows=60, learning_rate=0.01)
        assert found > wanted - 0.03
    stopped = score({}, 1, 20, num_rows=60, learning_rate=0.01, max_epochs=200, n_iter_no_change=2)
    assert stopped > wanted - 0.05


@pytest.mark.parametrize("make", [ADAM, LBFGS], ids=["adam", "lbfgs"])
@pytest.mark.parametrize("share", [1.0, 0.15])  # of rows in which it is not 0
def test_one_tiny_column_among_others_counts(make: Any, share: float) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1000, 20)).astype("f4")
    features[:, 0] = np.where(rng.random(1000) < share, 1 + np.abs(features[:, 0]), 0)
    targets = (features[:, 0] > (1.7 if share == 1 else 0)).astype(int)
    recalls = []
    for scale in (1, 1e-5):
        features[:, 0] *= scale
        head = HeadClassifier(random_state=0, device="cpu", class_weight="balanced", **make)
        head.fit(features[:500], targets[:500])
        preds = head.predict(features[500:])
        recalls.append([(preds == targets[500:])[targets[500:] == i].mean() for i in (0, 1)])
    assert min(recalls[0]) > 0.8
    assert min(recalls[1]) > min(recalls[0]) - 0.03


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "lbfgs"])
def test_the_saved_head_is_what_was_trained(optimizer: str) -> None:
    """Its logits of raw features, by torch and NumPy, are those that chose the epoch."""
    features, targets = blobs(70)
    rows = odd_columns(features)
    held_out, held_targets = odd_columns(blobs(31, seed=1)[0]), blobs(31, seed=1)[1]
    head = HeadConfig(12, 2, hidden=() if optimizer == "lbfgs" else (8,), dropout=0.0)
    result = fit_rows(rows, targets, head, optimizer=optimizer, valid=(held_out, held_targets))
    module = build_head(head, seed=0)
    module.load_state_dict(as_tensors(result.state))
    loss = result.history[result.best_epoch - 1]["valid_loss"]
    for logits in (
        logits_of(module, held_out), predict_logits(head, result.state, held_out)
    ):  # fmt: skip
        log_probs = logits - np.log(np.exp(logits.astype("f8")).sum(1, keepdims=True))
        found = -log_probs[np.arange(31), held_targets].mean()
        assert found == pytest.approx(loss, rel=1e-3)
    assert result.state["0.weight"][11] == 0  # it never varied
    assert all(np.isfinite(value).all() for value in result.state.values())


def test_standardised_training_is_a_plain_loop_on_standardised_rows() -> None:
    features, targets = blobs(70, dtype="f8")
    held_out = blobs(31, dtype="f8", seed=1)[0]
    mean, spread = features.mean(0), features.std(0)
    far, far_held_out = ((rows - mean) / spread + 3000 for rows in (features, held_out))
    standard = HeadConfig(12, 2, hidden=(8,), dropout=0.0)
    raw = fit_rows(far, targets, standard, valid=(far_held_out, blobs(31, seed=1)[1]))
    near = fit_rows(
        far - 3000, targets, standard, valid=(far_held_out - 3000, blobs(31, seed=1)[1])
    )
    logits = predict_logits(standard, raw.state, far_held_out)
    wanted = predict_logits(standard, near.state, far_held_out - 3000)
    np.testing.assert_allclose(logits, wanted, atol=1e-6)


# --- the same on every way


def stored_cache(path: Path, rows: Any, targets: Any, valid: Any) -> Any:
    """A cache of 70 rows to train on and 31 to choose by."""
    given = {"train": rows, "valid": valid.astype(rows.dtype)}
    return write_cache(
        path, given, {"train": targets, "valid": blobs(31, seed=1)[1]},
        {name: [f"{name}{i:03d}" for i in range(len(x))] for name, x in given.items()},
        classes=["a", "b"],
    )  # fmt: skip


def test_streams_views_and_half_precision_give_the_bits_of_memory(tmp_path: Path) -> None:
    (features, targets), valid = blobs(70), blobs(31, seed=1)[0]
    views = np.stack([odd_columns(features * c) for c in (1, 0.9, 1.1)], 1)
    for name, rows, held_out in (
        ("plain", odd_columns(features), odd_columns(valid)),
        ("half", (features * 1e-3).astype("f2"), valid * 1e-3),
        ("views", views, odd_columns(valid)[:, None]),
    ):
        splits = stored_cache(tmp_path / f"{name}.h5", rows, targets, held_out).splits
        valid_targets = splits["valid"].targets
        in_memory = fit_rows(rows, targets, valid=(splits["valid"].plain_features, valid_targets))
        stored = StoredFeatures(splits["train"], np.arange(70))
        stored_valid = StoredFeatures(splits["valid"], np.arange(31), plain=True)
        streamed = fit_rows(stored, targets, valid=(stored_valid, valid_targets))
        assert same_states(in_memory, streamed)
        assert Columns.measure(rows).need_scaling(TRAINING)


@pytest.mark.parametrize("way", ["compiled", "stacked"])
@pytest.mark.parametrize("kind", ["plain", "views", "stored"])
def test_compiled_and_stacked_heads_are_scaled_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, kind: str
) -> None:
    """Stacks are how GPUs train."""
    (features, targets), valid = blobs(70), odd_columns(blobs(31, seed=1)[0])
    rows = odd_columns(features)
    if kind == "views":
        rows = np.stack([odd_columns(features * c) for c in (1, 0.9, 1.1)], 1)
    given: Any = rows, (valid, blobs(31, seed=1)[1])
    if kind == "stored":
        splits = stored_cache(tmp_path / "c.h5", rows, targets, valid).splits
        stored = [StoredFeatures(splits[n], np.arange(len(splits[n]))) for n in ("train", "valid")]
        given = stored[0], (stored[1], given[1][1])
    monkeypatch.setattr(fit, "_KERNELS_WORTH", math.inf)
    wanted = fit_rows(given[0], targets, valid=given[1])
    monkeypatch.setattr(fit, "_KERNELS_WORTH", 0 if way == "compiled" else math.inf)
    if way == "stacked":
        monkeypatch.setattr(
            one_pass, "HeadGroup", lambda jobs, data, *_: StackTrainer(jobs, data, CPU.torch())
        )
    found = fit_rows(given[0], targets, valid=given[1])
    logits = [predict_logits(HEAD, result.state, valid) for result in (found, wanted)]
    np.testing.assert_allclose(*logits, atol=1e-3)
    losses = [[row["valid_loss"] for row in result.history] for result in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_alone_and_beside_others_of_every_kind_the_same() -> None:
    """One that is standardised and one that is not share batch size and epochs, but no pass."""
    features, targets = blobs(70)
    rows, held_out = features + 2, (blobs(31, seed=1)[0] + 2, blobs(31, seed=1)[1])
    jobs = [
        HeadJob(HEAD, TrainingConfig(epochs=15, patience=patience), seed)
        for seed, patience in enumerate((None, 1, None, 1))
    ]
    jobs.append(HeadJob(HeadConfig(12, 2, hidden=()), TrainingConfig(optimizer="lbfgs"), 0))
    needed = [Columns.measure(rows).need_scaling(job.training) for job in jobs[:4]]
    assert needed == [False, True, False, True]
    results = fit_heads(jobs, rows, targets, *held_out, data_seed=1, device=CPU)
    for job, result in zip(jobs, results, strict=True):
        (alone,) = fit_heads([job], rows, targets, *held_out, data_seed=1, device=CPU)
        assert same_states(alone, result)


def test_a_run_is_that_of_the_classifier_and_predicts(tmp_path: Path) -> None:
    features, targets = blobs(70)
    rows = odd_columns(features)
    cache = stored_cache(tmp_path / "c.h5", rows, targets, odd_columns(blobs(31, seed=1)[0]))
    options: dict[str, Any] = {"epochs": 4, "learning_rate": 0.01, "seed": 3}
    train(cache.path, tmp_path / "run", hidden=(8,), device="cpu", **options)
    head = HeadClassifier((8,), max_epochs=4, learning_rate=0.01, random_state=3, device="cpu")
    valid = cache.splits["valid"]
    head.fit(rows, targets, X_val=valid.features, y_val=valid.targets)
    state = head.head_.state_dict()
    run = load_run(tmp_path / "run")
    assert all(np.array_equal(state[name], value) for name, value in run.state.items())
    with pytest.warns(FeatcacheWarning, match="was trained on"):
        probs = predict(tmp_path / "run", cache=cache.path).probs[:70]
    np.testing.assert_allclose(probs, head.predict_proba(rows), atol=1e-4)
    with pytest.warns(FeatcacheWarning, match="chosen by 31 of the 31 rows"):
        assert evaluate(tmp_path / "run", split="valid")["num_samples"] == 31


# --- numbers that no head can compute with


@pytest.mark.parametrize("value", [1e24, -3e38, np.nan, np.inf])
@pytest.mark.parametrize("make", [{}, LBFGS], ids=["adam", "lbfgs"])
def test_features_out_of_range_are_named(value: float, make: Any) -> None:
    features, targets = blobs(70)
    features[33, 5] = value
    head = HeadConfig(12, 2, hidden=tuple(make.get("hidden_layer_sizes", (8,))))
    training = TrainingConfig(optimizer=make.get("solver", "adam"))
    good = blobs(31, seed=1)
    options: dict[str, Any] = {"seed": 0, "data_seed": 0, "device": CPU}
    with pytest.raises(DataError, match=r"training rows: expected features from .* in column 5 "):
        fit_head(head, training, features, targets, *good, **options)
    with pytest.raises(DataError, match=r"validation rows: expected features from .* column 5 "):
        fit_head(head, training, *good, features, targets, **options)
    if np.isfinite(value):
        with pytest.raises(ValueError, match=r"features from -1e\+18 to 1e\+18, found .* column 5"):
            HeadClassifier(device="cpu", **make).fit(features, targets)


def test_a_head_whose_outputs_are_not_finite_does_not_classify() -> None:
    """Of the classifier: every way to predict says so, instead of naming the first class."""
    features, targets = blobs(70)
    head = HeadClassifier((8,), max_epochs=2, random_state=0, device="cpu").fit(features, targets)
    head._state["0.running_var"][3] = -1
    for function in (head.predict, head.predict_proba, head.decision_function):
        with pytest.raises(ValueError, match=r"outputs of the head: expected finite .* \(row 0 "):
            function(features)


@pytest.mark.parametrize("has_valid", [True, False])
def test_weights_that_are_not_finite_are_noticed_in_their_epoch(
    monkeypatch: pytest.MonkeyPatch, has_valid: bool
) -> None:
    """Whatever the loss says: with or without validation rows, and of one head among others."""
    from featcache.heads.group import HeadGroup

    state = HeadGroup.state

    def broken(self: HeadGroup, place: int) -> dict[str, Any]:
        values = state(self, place)
        if place == 1:
            values["3.running_var"][0] = np.inf
        return values

    monkeypatch.setattr(HeadGroup, "state", broken)
    jobs = [HeadJob(HEAD, TRAINING, seed) for seed in range(2)]
    held_out = blobs(31, seed=1) if has_valid else ()
    monkeypatch.setattr(fit, "available_cores", lambda: 1)
    good, bad = fit_heads(jobs, *blobs(70), *held_out, data_seed=0, device=CPU)
    assert (good.diverged_in, len(good.history)) == (None, 4)
    assert (bad.diverged_in, bad.history) == (1, [])
