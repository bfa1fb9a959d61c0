"""Views drawn per row and epoch, and the order of the rows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sample_fits import blobs, fit, same_states
from torch import nn

from featcache.heads.batches import BatchSampler, TorchOrder, TrainingData
from featcache.heads.compiled import kernels
from featcache.heads.compiled.numpy_kernels import shuffle
from featcache.heads.config import FitResult, TrainingConfig
from featcache.heads.fit import fit_head
from featcache.heads.head import HeadConfig, build_head
from featcache.runtime import CPU


def fit_views(views: np.ndarray, *, data_seed: int = 6, **options: Any) -> FitResult:
    return fit_head(
        HeadConfig(12, 2, hidden=(8,), dropout=0.0),
        TrainingConfig(**({"epochs": 4, "learning_rate": 0.01} | options)),
        views, blobs(len(views))[1], *blobs(31, seed=1), seed=5, data_seed=data_seed, device=CPU,
    )  # fmt: skip


def test_equal_views_train_as_no_views_bit_for_bit() -> None:
    features = blobs(70)[0]
    assert same_states(fit_views(np.repeat(features[:, None], 5, 1)), fit(70))
    assert same_states(fit_views(features[:, None]), fit(70))


def test_each_epoch_trains_on_one_drawn_view_of_each_row() -> None:
    """Against a fit per epoch on the views that this test draws itself."""
    rng = np.random.default_rng(3)
    views = rng.normal(size=(64, 4, 12)).astype("f4")
    result = fit_views(views, epochs=3, optimizer="sgd", batch_size=64)
    draw = np.random.default_rng([6, 1])
    torch.manual_seed(5)
    head = build_head(HeadConfig(12, 2, hidden=(8,), dropout=0.0))
    stepper = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9)
    targets = torch.from_numpy(blobs(64)[1])
    order = torch.Generator().manual_seed(6)
    losses = []
    for _ in range(3):
        head.train()
        rows = torch.randperm(64, generator=order)
        chosen = draw.integers(4, size=64)
        loss = nn.functional.cross_entropy(
            head(torch.from_numpy(views)[rows, chosen]), targets[rows]
        )
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    assert [row["train_loss"] for row in result.history] == pytest.approx(losses, rel=1e-5)


def test_the_draw_of_views_is_uniform_and_new_in_every_epoch() -> None:
    views = np.tile(np.arange(5.0), (2000, 1))[:, :, None]  # a feature that tells its view
    targets = np.zeros(2000, int)
    sampler = BatchSampler(TrainingData.of(views, targets, None, None, None, [], 3), shuffle)
    epochs = [
        np.concatenate([rows[:, 0].astype(int) for _, rows in sampler.epoch(32)]) for _ in range(4)
    ]
    for epoch in epochs:
        counts = np.bincount(epoch, minlength=5)
        assert counts.sum() == 2000
        assert np.abs(counts - 400).max() < 80
    for one, two in itertools.pairwise(epochs):
        assert 0.1 < (one == two).mean() < 0.3


@pytest.mark.parametrize("num_rows", [1, 2, 3, 100, 29_999, 30_001, 100_000])
def test_orders_are_those_of_torch(num_rows: int) -> None:
    for seed in (0, 5, (1 << 32) + 3, (1 << 62) + 7):
        generator, order = torch.Generator().manual_seed(seed), TorchOrder(seed)
        for _ in range(2):
            wanted = torch.randperm(num_rows, generator=generator).numpy()
            swap = shuffle if seed else kernels.load(np.float32).shuffle
            assert np.array_equal(order.permutation(num_rows, swap), wanted)


def test_views_are_repeatable_by_the_data_seed() -> None:
    views = np.random.default_rng(0).normal(size=(70, 3, 12)).astype("f4")
    assert same_states(fit_views(views), fit_views(views))
    assert not same_states(fit_views(views), fit_views(views, data_seed=7))
    assert not same_states(fit_views(views), fit_views(views[:, :1]))


def test_half_precision_views_train_in_float32() -> None:
    views = np.random.default_rng(0).normal(size=(70, 3, 12)).astype("f2")
    assert same_states(fit_views(views), fit_views(views.astype("f4")))
