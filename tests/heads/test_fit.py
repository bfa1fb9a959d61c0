from __future__ import annotations

import math
import signal
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from sample_fits import assert_same_weights, blobs, fit, fit_all, plain_loop, same_states
from sample_heads import as_tensors, logits_of
from threadpoolctl import ThreadpoolController
from torch import nn

from featcache import threads as threads_module
from featcache.errors import ConfigError, DataError
from featcache.heads import fit as fit_module
from featcache.heads import group, linear_probe
from featcache.heads.compiled.training_step import Batch, TrainableHead
from featcache.heads.config import HeadJob, TrainingConfig, auto_batch_size
from featcache.heads.fit import fit_head, fit_heads
from featcache.heads.head import HeadConfig, build_head
from featcache.runtime import CPU, Device


@pytest.mark.parametrize(("dtype", "tolerance"), [("f4", 2e-5), ("f8", 1e-11)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_fit_ends_at_the_weights_of_a_plain_loop(
    dtype: str, tolerance: float, dropout: float
) -> None:
    result = fit(dtype=dtype, head=HeadConfig(12, 2, hidden=(8,), dropout=dropout))
    assert_same_weights(result, plain_loop(dtype=dtype, dropout=dropout), tolerance)


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"optimizer": "adamw", "weight_decay": 0.3},
         {"optimizer": torch.optim.AdamW, "weight_decay": 0.3}),
        ({"optimizer": "adam", "weight_decay": 0.3}, {"weight_decay": 0.3}),
        ({"optimizer": "sgd", "weight_decay": 0.1},
         {"optimizer": torch.optim.SGD, "momentum": 0.9, "weight_decay": 0.1}),
        ({"schedule": "cosine"}, {"schedule": True}),
        ({"warmup": 1}, {"warmup": 1}),
        ({"warmup": 2, "epochs": 5, "num_rows": 65}, {"warmup": 2, "epochs": 5, "num_rows": 65}),
        ({"schedule": "cosine", "warmup": 2, "epochs": 6},
         {"schedule": True, "warmup": 2, "epochs": 6}),
        ({"batch_size": 7}, {"batch_size": 7}),
        ({"label_smoothing": 0.2}, {"criterion": nn.CrossEntropyLoss(label_smoothing=0.2)}),
        ({"num_rows": 65}, {"num_rows": 65}),
        ({"learning_rate": 0.2, "epochs": 7}, {"lr": 0.2, "epochs": 7}),
        ({"class_weights": (0.5, 3.0), "label_smoothing": 0.2},
         {"criterion": nn.CrossEntropyLoss(torch.tensor([0.5, 3.0]).double(),
                                           label_smoothing=0.2)}),
    ],
)  # fmt: skip
def test_every_option_equals_the_plain_loop(options: Any, plain: Any) -> None:
    assert_same_weights(fit(dtype="f8", **options), plain_loop(dtype="f8", **plain), 1e-10)


def test_a_last_batch_of_one_row_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = TrainableHead.step

    def counting(self: TrainableHead, batch: Batch, *options: Any) -> float:
        sizes.append(len(batch.normed))
        return step(self, batch, *options)

    monkeypatch.setattr(TrainableHead, "step", counting)
    fit(65, head=HeadConfig(12, 2, hidden=()), epochs=2)
    assert sizes == [32, 32, 32, 32]
    sizes.clear()
    fit(66, head=HeadConfig(12, 2, hidden=()), epochs=1)
    assert sizes == [32, 32, 2]


def test_the_rate_rises_in_the_warm_up_and_then_falls() -> None:
    training = TrainingConfig(learning_rate=0.8, warmup=2, epochs=4, schedule="cosine")
    rates = [training.learning_rate_at(1 + i // 4, (i % 4 + 1) / 4) for i in range(16)]
    assert rates[:8] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert rates[8:] == pytest.approx([0.8] * 4 + [0.4] * 4)
    assert [row["learning_rate"] for row in fit(warmup=2).history] == pytest.approx(
        [0.005, 0.01, 0.01, 0.01]
    )


def test_balanced_weights_are_n_over_classes_times_count() -> None:
    features, _ = blobs(60, 3, "f8")
    targets = np.array([0] * 40 + [1] * 15 + [2] * 5)
    losses = {}
    for weights in ("none", "balanced"):
        training = TrainingConfig(
            epochs=1, learning_rate=1e-300, batch_size=60, class_weights=weights
        )
        result = fit_head(
            HeadConfig(12, 3, hidden=(), dropout=0.0), training, features, targets, features,
            targets, seed=0, data_seed=0, device=CPU,
        )  # fmt: skip
        losses[weights] = result.history[0]["train_loss"]
    head = build_head(HeadConfig(12, 3, hidden=(), dropout=0.0), seed=0).double()
    logits = head(torch.from_numpy(features)).detach().numpy()
    each = np.log(np.exp(logits).sum(1)) - logits[np.arange(60), targets]
    weight = (60 / (3 * np.array([40, 15, 5])))[targets]
    assert losses["none"] == pytest.approx(each.mean(), rel=1e-12)
    assert losses["balanced"] == pytest.approx((weight * each).sum() / weight.sum(), rel=1e-12)


def test_repeatable_bit_for_bit_and_by_both_seeds() -> None:
    head = HeadConfig(12, 2, hidden=(16, 8))
    first, again = fit(head=head), fit(head=head)
    assert all(np.array_equal(first.state[name], again.state[name]) for name in first.state)
    assert [r["valid_loss"] for r in first.history] == [r["valid_loss"] for r in again.history]
    for change in ({"seed": 7}, {"data_seed": 7}):
        other = fit(head=head, **change)
        assert not np.array_equal(first.state["1.weight"], other.state["1.weight"])


def test_callers_random_state_is_untouched_and_does_not_matter() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = fit(head=HeadConfig(12, 2, hidden=(8,), dropout=0.5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(456)
    second = fit(head=HeadConfig(12, 2, hidden=(8,), dropout=0.5))
    assert all(np.array_equal(first.state[name], second.state[name]) for name in first.state)


def test_kept_is_the_epoch_with_the_lowest_validation_loss() -> None:
    result = fit(learning_rate=0.3, epochs=12)
    losses = [row["valid_loss"] for row in result.history]
    assert result.best_epoch == 1 + int(np.argmin(losses)) < 12  # or this test shows nothing
    features, targets = blobs(31, seed=1)
    head = build_head(HeadConfig(12, 2, hidden=(8,)), seed=0)
    head.load_state_dict(as_tensors(result.state))
    loss = nn.functional.cross_entropy(
        torch.from_numpy(logits_of(head, features)).double(), torch.from_numpy(targets)
    )
    assert loss.item() == pytest.approx(min(losses), rel=1e-6)


def test_ties_keep_the_earliest_epoch_and_patience_counts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([0.5, 0.4, 0.4, 0.4, 0.1])
    row = {"valid_accuracy": 0.5, "valid_recall_0": 0.5, "valid_recall_1": 0.5}
    monkeypatch.setattr(
        "featcache.heads.group.validation_columns",
        lambda *_: {"valid_loss": next(losses), **row},
    )
    result = fit(epochs=5, patience=2)
    assert (result.best_epoch, len(result.history)) == (2, 4)


def test_without_patience_all_epochs_run() -> None:
    assert len(fit(learning_rate=0.3, epochs=9).history) == 9
    assert len(fit(learning_rate=0.3, epochs=9, patience=1).history) < 9


def test_history_rows_are_told_as_they_are_made_and_are_true() -> None:
    told: list[dict[str, Any]] = []
    features, targets = blobs(40, 3)
    held_out, held_out_targets = blobs(20, 3, seed=2)
    some = held_out_targets != 1
    result = fit_head(
        HeadConfig(12, 3, hidden=(8,)), TrainingConfig(epochs=3, schedule="cosine"), features,
        targets, held_out[some], held_out_targets[some], seed=0, data_seed=0, device=CPU,
        classes=["a", "b", "c"], on_epoch=told.append,
    )  # fmt: skip
    assert told == result.history
    assert list(told[0]) == [
        "epoch", "train_loss", "valid_loss", "valid_accuracy", "valid_recall_a", "valid_recall_b",
        "valid_recall_c", "learning_rate", "seconds",
    ]  # fmt: skip
    assert [row["epoch"] for row in told] == [1, 2, 3]
    assert [row["learning_rate"] for row in told] == pytest.approx([5e-4, 3.75e-4, 1.25e-4])
    head = build_head(HeadConfig(12, 3, hidden=(8,)), seed=0)
    head.load_state_dict(as_tensors(result.state))
    right = logits_of(head, held_out[some]).argmax(1) == held_out_targets[some]
    best = result.history[result.best_epoch - 1]
    assert best["valid_accuracy"] == pytest.approx(right.mean())
    assert best["valid_recall_a"] == pytest.approx(right[held_out_targets[some] == 0].mean())
    assert best["valid_recall_b"] is None


def test_float16_and_mapped_features_train_as_float32() -> None:
    features, targets = blobs(50)
    halves = features.astype("f2")
    halves.setflags(write=False)
    training, head = TrainingConfig(epochs=2), HeadConfig(12, 2, hidden=(8,))
    options: dict[str, Any] = {"seed": 0, "data_seed": 0, "device": CPU}
    a = fit_head(head, training, halves, targets, halves, targets, **options)
    same = halves.astype("f4")
    b = fit_head(head, training, same, targets, same, targets, **options)
    assert all(np.array_equal(a.state[name], b.state[name]) for name in a.state)


@pytest.mark.parametrize(
    ("rows", "size"),
    [(0, 32), (1, 32), (200, 32), (4_500, 32), (4_550, 64), (100_000, 1024), (10**9, 4096)],
)
def test_automatic_batch_size(rows: int, size: int) -> None:
    assert auto_batch_size(rows) == size
    if rows:
        assert auto_batch_size(rows) == np.clip(2 ** round(math.log2(rows / 100)), 32, 4096)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0}, {"learning_rate": float("nan")}, {"learning_rate": "1"},
        {"weight_decay": -1}, {"optimizer": "rmsprop"}, {"schedule": "step"}, {"batch_size": 1},
        {"batch_size": "large"}, {"epochs": 0}, {"epochs": 1.5}, {"epochs": True}, {"patience": 0},
        {"class_weights": "some"}, {"class_weights": (1.0, -1.0)}, {"class_weights": (1.0, None)},
        {"class_weights": [[1.0], [1.0]]}, {"class_weights": [True, 1.0]},
        {"epochs": np.bool_(True)}, {"learning_rate": np.bool_(True)}, {"learning_rate": 10**400},
        {"label_smoothing": 1.0}, {"warmup": -1}, {"warmup": 10},
        {"warmup": 0.5},
    ],
)  # fmt: skip
def test_options_without_meaning_are_refused_by_name(change: dict[str, Any]) -> None:
    option = "--" + next(iter(change)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"^{option}: expected"):
        TrainingConfig(**change)


def test_arrays_that_do_not_fit_are_refused() -> None:
    features, targets = blobs(10)
    head, training = HeadConfig(12, 2), TrainingConfig()
    options: dict[str, Any] = {"seed": 0, "data_seed": 0, "device": CPU}
    for rows, wanted in (
        ((features[:, :5], targets), "training rows: expected features"),
        ((features[:, None, None], targets), "training rows: expected features"),
        ((features[:, None, :5], targets), r"expected features \(N, V, 12\) and targets"),
        ((features[:, None][:0], targets[:0]), "training rows: expected at least 2, found 0"),
        ((features[:, None][:, :0], targets), "training rows: expected at least one view"),
        ((features, targets[:5]), "training rows: expected features"),
        ((features, targets.astype(float)), "training rows: expected features"),
        ((features, targets + 1), "expected targets from 0 to 1, found 1 to 2"),
        ((features, targets - 1), "expected targets from 0 to 1, found -1 to 0"),
        ((features[:1], targets[:1]), "training rows: expected at least 2, found 1"),
    ):
        with pytest.raises(DataError, match=wanted):
            fit_head(head, training, *rows, features, targets, **options)
    with pytest.raises(DataError, match=r"validation rows: expected features \(N, 12\)"):
        fit_head(head, training, features, targets, features[:, None], targets, **options)
    with pytest.raises(DataError, match="validation rows: expected at least 1, found 0"):
        fit_head(head, training, features, targets, features[:0], targets[:0], **options)


# --- rows with weights; no validation rows


@pytest.mark.parametrize("class_weights", ["none", (0.5, 3.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_rows_with_weights_equal_the_plain_loop(class_weights: Any, smoothing: float) -> None:
    features, targets = blobs(70, 2, "f8")
    weights = np.random.default_rng(0).uniform(0.1, 4, 70)
    result = fit_head(
        HeadConfig(12, 2, hidden=(), dropout=0.0),
        TrainingConfig(
            epochs=4, learning_rate=0.01, class_weights=class_weights, label_smoothing=smoothing
        ),
        features, targets, seed=5, data_seed=6, device=CPU, train_weights=weights,
    )  # fmt: skip
    x, y, w = (torch.from_numpy(array) for array in (features, targets, weights))
    per_class = None if class_weights == "none" else torch.tensor(class_weights).double()
    torch.manual_seed(5)
    head = nn.Sequential(nn.BatchNorm1d(12), nn.Dropout(0.0), nn.Linear(12, 2)).double()
    stepper = torch.optim.Adam(head.parameters(), lr=0.01)
    order = torch.Generator().manual_seed(6)
    for _ in range(4):
        for batch in torch.randperm(70, generator=order).split(32):
            losses = nn.functional.cross_entropy(
                head(x[batch]), y[batch], per_class, reduction="none", label_smoothing=smoothing
            )
            total = w[batch] if per_class is None else w[batch] * per_class[y[batch]]
            loss = (losses * w[batch]).sum() / total.sum()
            stepper.zero_grad()
            loss.backward()
            stepper.step()
    for name, value in head.state_dict().items():
        np.testing.assert_allclose(result.state[name], value.numpy(), 1e-10, 1e-10)


def test_weights_that_do_not_fit_are_refused() -> None:
    features, targets = blobs(10)
    options: dict[str, Any] = {"seed": 0, "data_seed": 0, "device": CPU}
    for weights in (np.ones(9), np.ones((10, 1)), np.r_[0.0, np.ones(9)], np.full(10, np.nan)):
        with pytest.raises(DataError, match=r"weights of training rows: expected \(10,\) finite"):
            fit_head(
                HeadConfig(12, 2), TrainingConfig(), features, targets, train_weights=weights,
                **options,
            )  # fmt: skip
    with pytest.raises(ConfigError, match="--class-weights: expected 2 numbers, found 3"):
        fit_head(
            HeadConfig(12, 2), TrainingConfig(class_weights=(1, 1, 1)), features, targets, **options
        )


def test_without_validation_rows_the_last_epoch_is_kept() -> None:
    options: dict[str, Any] = {"epochs": 4, "learning_rate": 0.01}
    with_rows, without = fit(**options), fit_all(**options)
    assert with_rows.best_epoch == without.best_epoch == 4  # or the next line shows nothing
    assert same_states(with_rows, without)
    assert list(without.history[0]) == ["epoch", "train_loss", "learning_rate", "seconds"]
    wanted = [row["train_loss"] for row in with_rows.history]
    assert [row["train_loss"] for row in without.history] == wanted


def test_without_validation_rows_patience_watches_the_training_loss() -> None:
    options: dict[str, Any] = {"learning_rate": 3.0, "optimizer": "sgd"}
    result = fit_all(epochs=60, patience=2, **options)
    losses = [row["train_loss"] for row in result.history]
    assert len(losses) == 1 + int(np.argmin(losses)) + 2 < 60
    assert result.best_epoch == len(losses)
    assert same_states(result, fit_all(epochs=len(losses), **options))


def test_balanced_weights_ignore_a_class_without_rows() -> None:
    features, targets = blobs(10)
    training = TrainingConfig(epochs=1, class_weights="balanced", label_smoothing=0.1)
    result = fit_head(
        HeadConfig(12, 3), training, features, targets, features, targets, seed=0, data_seed=0,
        device=CPU,
    )  # fmt: skip
    assert math.isfinite(result.history[0]["train_loss"])


def test_blas_gets_its_number_of_threads_back_and_it_does_not_matter() -> None:
    seen, states = [], []
    blas = ThreadpoolController().select(user_api="blas")

    def count_threads() -> set[int]:
        return {info["num_threads"] for info in blas.info() if "numpy" in info["filepath"]}

    for threads in (1, 2):
        with blas.limit(limits=threads):
            before = count_threads()
            result = fit(
                epochs=2, on_epoch=lambda _: seen.extend(count_threads()), head=HeadConfig(12, 2)
            )
            states.append(result.state)
            assert count_threads() == before
    assert set(seen) == {1}
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_a_loss_that_is_no_number_stops_with_advice() -> None:
    with pytest.raises(ConfigError, match=r"expected a finite loss.*Lower --learning-rate"):
        fit(learning_rate=1e38, optimizer="sgd", epochs=50)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu_and_repeats() -> None:
    rows, held_out = blobs(70), blobs(31, seed=1)
    head, training = HeadConfig(12, 2, hidden=(8,), dropout=0.0), TrainingConfig(epochs=4)
    options: dict[str, Any] = {"seed": 5, "data_seed": 6}
    cpu = fit_head(head, training, *rows, *held_out, device=CPU, **options)
    before = torch.cuda.get_rng_state()
    gpu = [
        fit_head(head, training, *rows, *held_out, device=Device("cuda"), **options)
        for _ in range(2)
    ]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for name, value in cpu.state.items():
        assert np.array_equal(gpu[0].state[name], gpu[1].state[name])
        np.testing.assert_allclose(gpu[0].state[name], value, 1e-4, 1e-5)


def test_heads_of_passes_side_by_side_get_their_own_initial_weights() -> None:
    """torch has one generator for all threads: nobody may seed it while another draws."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 64)), np.array([0, 1] * 4)
    training = TrainingConfig(epochs=1, learning_rate=1e-12)
    heads = [HeadConfig(64, 2, (width,)) for width in range(100, 140)]  # a pass each
    jobs = [HeadJob(head, training, seed) for seed, head in enumerate(heads)]
    for _ in range(3):
        results = fit_heads(jobs, x, y, data_seed=0, device=CPU)
        for job, result in zip(jobs, results, strict=True):
            wanted = build_head(job.head, job.seed).state_dict()["1.weight"].double()
            np.testing.assert_allclose(result.state["1.weight"], wanted.numpy(), 1e-7, 1e-9)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_ctrl_c_does_not_wait_for_heads_that_are_trained_in_threads(
    monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Without an end between two steps this would last for years."""
    monkeypatch.setattr(fit_module, "available_cores", lambda: 2)
    monkeypatch.setattr(linear_probe, "MAX_ITERATIONS", 10**9)
    monkeypatch.setattr(linear_probe, "_TOLERANCE", 0.0)
    training = TrainingConfig(epochs=10**6)
    if optimizer == "lbfgs":
        training = TrainingConfig(optimizer="lbfgs", weight_decay=1e-6)
    jobs = [HeadJob(HeadConfig(12, 2, hidden=()), training, seed) for seed in (1, 2)]
    begun = threading.Barrier(3)
    inner = threads_module.stop_if_asked

    def watched() -> None:
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            begun.wait(300)
        inner()

    seen: set[int] = set()
    for module in (group, linear_probe):
        monkeypatch.setattr(module, "stop_if_asked", watched)

    def interrupt() -> None:
        begun.wait(300)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        fit_heads(jobs, *blobs(40), *blobs(20, seed=1), data_seed=1, device=CPU)
