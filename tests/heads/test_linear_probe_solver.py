"""Logistic regression for many strengths at once against scikit-learn's, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from featcache.heads import linear_probe
from featcache.heads.config import STRENGTHS
from featcache.heads.linear_probe import SoftmaxRegression, Solution


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small only wait for each other on more threads, and long on a busy machine."""
    with threadpoolctl.threadpool_limits(1):
        yield


def noisy(num_rows: int, width: int, num_classes: int, seed: int = 0) -> tuple[Any, Any]:
    """Standardised rows of overlapping classes, some features nearly copies of others."""
    rng = np.random.default_rng(seed)
    targets = np.arange(num_rows) % num_classes
    rows = rng.normal(size=(num_rows, width)) @ rng.normal(size=(width, width))
    rows += rng.normal(size=(num_classes, width))[targets]
    return (rows - rows.mean(0)) / rows.std(0), targets


def solve(rows: Any, wanted: Any, strengths: Any, block: int = 16) -> list[Solution]:
    regression = SoftmaxRegression(rows, wanted)
    solutions = []
    for start in range(0, len(strengths), block):
        solutions += regression.solve(strengths[start : start + block])
    return solutions


def objective(rows: Any, wanted: Any, weight: Any, bias: Any, strength: float) -> float:
    logits = rows @ weight.T + bias
    loss = (wanted * (logsumexp(logits, axis=1, keepdims=True) - logits)).sum()
    return float(loss + strength / 2 * (weight**2).sum())


def of(rows: Any, wanted: Any, solution: Solution) -> float:
    return objective(rows, wanted, solution.weight, solution.bias, solution.strength)


def scikit_learn(rows: Any, targets: Any, strength: float, sample_weight: Any = None) -> Any:
    """Weights and biases of both classes or more."""
    num_classes = len(np.unique(targets))
    total = len(targets) if sample_weight is None else sample_weight.sum()
    model = LogisticRegression(
        C=(2 if num_classes == 2 else 1) / (strength * total), tol=1e-9, max_iter=100_000
    ).fit(rows, targets, sample_weight)
    if num_classes == 2:
        half = model.coef_ / 2, model.intercept_ / 2
        return np.concatenate([-half[0], half[0]]), np.concatenate([-half[1], half[1]])
    return model.coef_, model.intercept_


@pytest.mark.parametrize(
    ("num_rows", "width", "num_classes"), [(150, 8, 2), (150, 8, 4), (40, 60, 2), (40, 60, 3)]
)
def test_every_strength_has_scikit_learns_optimum(
    num_rows: int, width: int, num_classes: int
) -> None:
    rows, targets = noisy(num_rows, width, num_classes)
    wanted = np.eye(num_classes)[targets] / num_rows
    solutions = solve(rows, wanted, STRENGTHS)
    assert [solution.strength for solution in solutions] == list(STRENGTHS)
    for solution in solutions:
        assert solution.converged
        theirs = objective(
            rows, wanted, *scikit_learn(rows, targets, solution.strength), solution.strength
        )
        assert of(rows, wanted, solution) == pytest.approx(theirs, abs=1e-6)
        assert of(rows, wanted, solution) <= theirs + 2e-9  # what converged means
        assert np.abs(solution.weight.sum(0)).max() < 1e-10 * (1 + np.abs(solution.weight).max())


def test_weights_of_rows_are_scikit_learns() -> None:
    rows, targets = noisy(120, 6, 3)
    of_rows = np.random.default_rng(1).uniform(0.1, 5, 120)
    wanted = np.eye(3)[targets] * of_rows[:, None] / of_rows.sum()
    for solution in solve(rows, wanted, [1.0, 1e-2, 1e-4]):
        weight, bias = scikit_learn(rows, targets, solution.strength, of_rows)
        np.testing.assert_allclose(solution.weight, weight, atol=2e-3)
        theirs = objective(rows, wanted, weight, bias, solution.strength)
        assert of(rows, wanted, solution) == pytest.approx(theirs, abs=2e-9)


def test_the_loss_is_that_without_regularisation() -> None:
    rows, targets = noisy(60, 5, 3)
    wanted = np.eye(3)[targets] / 60
    (solution,) = solve(rows, wanted, [0.05])
    plain = objective(rows, wanted, solution.weight, solution.bias, 0.0)
    assert solution.loss == pytest.approx(plain, rel=1e-12)


def test_blocks_of_any_size_end_at_the_same_optima() -> None:
    rows, targets = noisy(100, 8, 3)
    wanted = np.eye(3)[targets] / 100
    ways = [solve(rows, wanted, STRENGTHS[::4], block) for block in (1, 4, 17)]
    for solutions in zip(*ways, strict=True):
        values = [of(rows, wanted, solution) for solution in solutions]
        assert max(values) - min(values) < 2e-9


def test_warm_starts_save_iterations() -> None:
    rows, targets = noisy(300, 30, 3)
    wanted = np.eye(3)[targets] / 300
    warm = solve(rows, wanted, STRENGTHS, block=1)
    cold = [solve(rows, wanted, [strength])[0] for strength in STRENGTHS]
    assert sum(s.num_iterations for s in warm) < sum(s.num_iterations for s in cold)


def test_classes_a_plane_parts_at_next_to_no_strength_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, targets = noisy(40, 60, 2)
    wanted = np.eye(2)[targets] / 40
    monkeypatch.setattr(linear_probe, "MAX_ITERATIONS", 30)
    for strength in (1e-12, 1e-200):
        (solution,) = solve(rows, wanted, [strength])
        assert (solution.converged, solution.num_iterations) == (False, 30)
        assert np.isfinite(solution.weight).all()
        assert 0 <= solution.loss < 1e-3
    (solution,) = solve(rows, wanted, [1e-1])
    assert solution.converged


def test_constant_features_and_a_feature_twice_are_no_trouble() -> None:
    rows, targets = noisy(80, 4, 2)
    rows = np.concatenate([rows, rows[:, :1], np.zeros((80, 2))], 1)
    wanted = np.eye(2)[targets] / 80
    for solution in solve(rows, wanted, STRENGTHS):
        assert solution.converged
        weight = solution.weight
        np.testing.assert_allclose(weight[:, 0], weight[:, 4], rtol=1e-3, atol=1e-4)
        assert not np.abs(weight[:, 5:]).max() > 1e-12
