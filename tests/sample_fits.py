"""Small trainings, and the same as a twenty-line script in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sample_heads import SeededDropout
from torch import nn

from featcache.heads.config import FitResult, TrainingConfig
from featcache.heads.fit import fit_head
from featcache.heads.head import HeadConfig
from featcache.runtime import CPU


def blobs(num_rows: int, num_classes: int = 2, dtype: str = "f4", seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    targets = np.arange(num_rows) % num_classes
    features = rng.normal(size=(num_rows, 12)).astype(dtype)
    features[np.arange(num_rows), targets] += 1.5
    # Or few steps would leave so much of the mean missing that rows are standardised.
    return features - features.mean(0), targets


def fit(
    num_rows: int = 70,
    *,
    head: HeadConfig | None = None,
    dtype: str = "f4",
    seed: int = 5,
    data_seed: int = 6,
    on_epoch: Any = None,
    **options: Any,
) -> FitResult:
    head = head or HeadConfig(12, 2, hidden=(8,), dropout=0.0)
    training = TrainingConfig(**({"epochs": 4, "learning_rate": 0.01} | options))
    rows = blobs(num_rows, head.num_classes, dtype)
    held_out = blobs(31, head.num_classes, dtype, seed=1)
    return fit_head(
        head, training, *rows, *held_out, seed=seed, data_seed=data_seed, device=CPU,
        on_epoch=on_epoch,
    )  # fmt: skip


def plain_loop(
    num_rows: int = 70,
    *,
    dtype: str = "f4",
    optimizer: Any = torch.optim.Adam,
    schedule: bool = False,
    warmup: int = 0,
    criterion: nn.Module | None = None,
    dropout: float = 0.0,
    epochs: int = 4,
    batch_size: int = 32,
    lr: float = 0.01,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train as a twenty-line script would; return the best epoch's state and the losses."""
    features, targets = map(torch.from_numpy, blobs(num_rows, 2, dtype))
    held_out, held_out_targets = map(torch.from_numpy, blobs(31, 2, dtype, seed=1))
    torch.manual_seed(5)
    head = nn.Sequential(
        nn.BatchNorm1d(12), nn.Linear(12, 8), nn.ReLU(), nn.BatchNorm1d(8),
        SeededDropout(dropout, 5),
        nn.Linear(8, 2),
    ).to(features.dtype)  # fmt: skip
    stepper = optimizer(head.parameters(), lr=lr, **options)
    schedules = torch.optim.lr_scheduler
    steps = warmup * (num_rows // batch_size + (num_rows % batch_size > 1))
    rising = schedules.LinearLR(stepper, 1 / steps, 1, steps - 1) if warmup else None
    cosine = schedules.CosineAnnealingLR(stepper, epochs - warmup) if schedule else None
    order = torch.Generator().manual_seed(6)
    states, losses = [], []
    for epoch in range(epochs):
        head.train()
        rows = torch.randperm(num_rows, generator=order)
        for start in range(0, num_rows, batch_size):
            batch = rows[start : start + batch_size]
            if len(batch) > 1:
                loss = (criterion or nn.CrossEntropyLoss())(head(features[batch]), targets[batch])
                stepper.zero_grad()
                loss.backward()
                stepper.step()
                if rising is not None and epoch < warmup:
                    rising.step()
        if cosine is not None and epoch >= warmup:
            cosine.step()
        head.eval()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(head(held_out), held_out_targets)
        losses.append(loss.item())
        states.append({name: value.clone() for name, value in head.state_dict().items()})
    return states[int(np.argmin(losses))], losses


def assert_same_weights(
    result: FitResult, wanted: tuple[dict[str, torch.Tensor], list[float]], tolerance: float
) -> None:
    state, losses = wanted
    assert [row["valid_loss"] for row in result.history] == pytest.approx(losses, rel=tolerance)
    assert list(result.state) == list(state)
    for name, value in state.items():
        np.testing.assert_allclose(result.state[name], value.numpy(), tolerance, tolerance)


def fit_all(num_rows: int = 70, **options: Any) -> FitResult:
    return fit_head(
        HeadConfig(12, 2, hidden=(8,), dropout=0.0), TrainingConfig(**options), *blobs(num_rows),
        seed=5, data_seed=6, device=CPU,
    )  # fmt: skip


def same_states(one: FitResult, two: FitResult) -> bool:
    return all(np.array_equal(one.state[name], two.state[name]) for name in one.state)
