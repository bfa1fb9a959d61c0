"""Several labels a row: whole trainings against a plain loop with torch's own masked loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sample_heads import SeededDropout, as_tensors, probs_of
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from featcache.errors import ConfigError, DataError
from featcache.heads.compiled import kernels, numpy_kernels
from featcache.heads.config import HeadJob, TrainingConfig
from featcache.heads.fit import fit_head, fit_heads
from featcache.heads.head import HeadConfig, build_head
from featcache.heads.loss import class_weights, target_weights
from featcache.runtime import CPU

HEAD = HeadConfig(12, 4, hidden=(8,), dropout=0.4)


def labels(num_rows: int, seed: int = 0) -> tuple[Any, Any]:
    """Rows of four classes, a third unknown: class 2 has no positive, class 3 is wholly unknown."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((num_rows, 4)) < 0.3).astype("f4")
    features = rng.normal(size=(num_rows, 12))
    features[:, :4] += targets
    targets[rng.random((num_rows, 4)) < 1 / 3] = np.nan
    targets[:, 2] *= 0
    targets[:, 3] = np.nan
    targets[np.isnan(targets).all(axis=1), 0] = 1
    return features, targets


def plain_loop(smoothing: float, pos_weight: Any, seed: int = 5) -> tuple[Any, list[float]]:
    (features, targets), (held_out, held_targets) = labels(70), labels(31, 1)
    x, held = torch.from_numpy(features), torch.from_numpy(held_out)
    torch.manual_seed(seed)
    head = nn.Sequential(
        nn.BatchNorm1d(12), nn.Linear(12, 8), nn.ReLU(), nn.BatchNorm1d(8),
        SeededDropout(0.4, seed), nn.Linear(8, 4),
    ).double()  # fmt: skip
    stepper = torch.optim.Adam(head.parameters(), lr=0.01)
    order, states, losses = torch.Generator().manual_seed(6), [], []

    def loss_of(logits: Any, wanted: Any, smoothing: float, pos_weight: Any) -> Any:
        mask = torch.from_numpy(~np.isnan(wanted)).double()
        smooth = torch.from_numpy(np.nan_to_num(wanted).astype("f8") * (1 - smoothing))
        smooth += smoothing / 2
        total = binary_cross_entropy_with_logits(
            logits, smooth, weight=mask, reduction="sum", pos_weight=pos_weight
        )
        return total / mask.sum()

    for _ in range(4):
        head.train()
        for batch in torch.randperm(70, generator=order).split(32):
            stepper.zero_grad()
            loss_of(head(x[batch]), targets[batch.numpy()], smoothing, pos_weight).backward()
            stepper.step()
        head.eval()
        with torch.no_grad():
            losses.append(loss_of(head(held), held_targets, 0, None).item())
        states.append({name: value.clone() for name, value in head.state_dict().items()})
    return states[int(np.argmin(losses))], losses


def balanced() -> torch.Tensor:
    """Of known targets by hand: no positive, or nothing known, counts 1."""
    _, targets = labels(70)
    ones, zeros = (targets == 1).sum(0), (targets == 0).sum(0)
    assert (ones[2], ones[3], zeros[3]) == (0, 0, 0)
    return torch.tensor([zeros[0] / ones[0], zeros[1] / ones[1], 1, 1]).double()


OPTIONS: list[tuple[dict[str, Any], float, Any]] = [
    ({}, 0.0, None),
    ({"label_smoothing": 0.2}, 0.2, None),
    ({"class_weights": "balanced"}, 0.0, balanced()),
    ({"class_weights": (0.5, 3.0, 1.0, 2.0), "label_smoothing": 0.1}, 0.1,
     torch.tensor([0.5, 3.0, 1.0, 2.0]).double()),
]  # fmt: skip


def test_whole_trainings_equal_a_plain_loop_alone_and_in_one_stack() -> None:
    rows = (*labels(70), *labels(31, 1))
    jobs = [
        HeadJob(HEAD, TrainingConfig(epochs=4, learning_rate=0.01, **options), 5)
        for options, _, _ in OPTIONS
    ]
    together = fit_heads(jobs, *rows, data_seed=6, device=CPU)
    for job, (_, smoothing, pos_weight), stacked in zip(jobs, OPTIONS, together, strict=True):
        alone = fit_head(HEAD, job.training, *rows, seed=5, data_seed=6, device=CPU)
        state, losses = plain_loop(smoothing, pos_weight)
        for result in (alone, stacked):
            found = [row["valid_loss"] for row in result.history]
            assert found == pytest.approx(losses, rel=1e-10)
            for name, value in state.items():
                np.testing.assert_allclose(result.state[name], value.numpy(), 1e-10, 1e-10)


def test_history_is_over_known_targets_and_a_class_without_positives_has_no_recall() -> None:
    held_out, targets = labels(31, 1)
    result = fit_head(
        HEAD, TrainingConfig(epochs=3), *labels(70), held_out, targets, seed=0, data_seed=0,
        device=CPU, classes=list("abcd"),
    )  # fmt: skip
    head = build_head(HEAD, seed=0).double()
    head.load_state_dict(as_tensors(result.state))
    probs = probs_of(head, held_out, "multilabel")
    kept, known = result.history[result.best_epoch - 1], ~np.isnan(targets)
    right = (probs > 0.5) == (targets == 1)
    assert kept["valid_accuracy"] == pytest.approx(right[known].mean())
    assert kept["valid_recall_a"] == pytest.approx((probs[:, 0] > 0.5)[targets[:, 0] == 1].mean())
    assert kept["valid_recall_c"] is kept["valid_recall_d"] is None


def test_the_gradient_is_autograds_also_where_the_head_is_all_but_sure() -> None:
    logits = torch.tensor([[[-800.0, -3, 0, 2], [800, 40, -40, 1]]]).double().requires_grad_()
    targets = torch.tensor([[1, 0, np.nan, 1], [0, 1, 0, np.nan]]).double()
    row_weights = torch.tensor([0.5, 2.0]).double()
    weights = target_weights(targets.numpy(), np.ones(4), 0.0, row_weights.numpy())
    mask = (~targets.isnan()).double() * row_weights[:, None]
    loss = binary_cross_entropy_with_logits(
        logits[0], targets.nan_to_num(), weight=mask, reduction="sum"
    ) / mask.sum()  # fmt: skip
    loss.backward()
    assert logits.grad is not None
    for functions in (numpy_kernels, kernels.load(np.float64)):
        grad = np.empty((4, 2))
        found = functions.loss_and_gradient(logits[0].detach().numpy().T.copy(), *weights, grad)
        assert found == pytest.approx(loss.item(), rel=1e-14)
        np.testing.assert_allclose(grad.T, logits.grad[0].numpy(), 1e-13, 1e-15)


def test_targets_that_do_not_fit_are_refused() -> None:
    (features, targets), training = labels(10), TrainingConfig()
    empty, seven = targets.copy(), targets.copy()
    empty[3], seven[3, 0] = np.nan, 7
    for wrong, found in (
        (targets[:, :3], r"targets \(N, 4\) of floats"), (targets[:5], r"\(N, 4\) of floats"),
        (np.zeros((10, 4), int), "of floats"), (empty, "a row without a known one"),
        (seven, "found other numbers"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=found):
            fit_head(HEAD, training, features, wrong, seed=0, data_seed=0, device=CPU)
    with pytest.raises(DataError, match=r"validation rows: expected .* of floats"):
        fit_head(
            HEAD, training, features, targets, features, np.zeros(10, int), seed=0, data_seed=0,
            device=CPU,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="--class-weights: expected 4 numbers, found 1"):
        class_weights((1.0,), targets, 4, np.float32)
