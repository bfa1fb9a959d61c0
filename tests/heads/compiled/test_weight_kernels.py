"""Weights moved in registers, and all other parameters, against torch's optimizers."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
import torch

from featcache.heads.compiled.optimizer_kernels import move
from featcache.heads.compiled.products import DEPTH
from featcache.heads.compiled.vectors import PANEL, UNITS
from featcache.heads.compiled.weight_kernels import move_weights
from featcache.heads.config import OPTIMIZERS

_Floats = npt.NDArray[np.float32]

RATE, DECAY, BETAS = 0.01, 0.1, (0.9, 0.999)


@numba.njit
def move_now(
    kind: int, param: _Floats, grad: _Floats, first: _Floats, second: _Floats, settings: _Floats
) -> None:
    move(kind, param, grad, first, second, settings)


@numba.njit
def move_weights_now(
    kind: int, grad: _Floats, rows: _Floats, sums: _Floats, scale: _Floats, shift: _Floats,
    norm_grads: _Floats, weights: _Floats, first: _Floats, second: _Floats, settings: _Floats,
) -> None:  # fmt: skip
    move_weights(kind, grad, rows, sums, scale, shift, norm_grads, weights, first, second, settings)


def settings_at(step: int) -> _Floats:
    return np.array([RATE, DECAY, *(1 - beta**step for beta in BETAS)], np.float32)


def optimizer_of(name: str, param: torch.Tensor) -> Any:
    if name == "sgd":
        return torch.optim.SGD([param], RATE, momentum=0.9, weight_decay=DECAY)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind([param], RATE, weight_decay=DECAY)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("size", [1, PANEL - 1, PANEL, 3 * PANEL + 2])
def test_parameters_move_as_by_torch(name: str, size: int) -> None:
    rng, kind = np.random.default_rng(size), OPTIMIZERS.index(name)
    values = rng.standard_normal(size).astype("f4")
    whole = np.full(size + PANEL, np.nan, np.float32)  # what lies behind stays as it is
    whole[:size] = values
    first = np.zeros(size, np.float32)
    second = np.zeros(size, np.float32) if name != "sgd" else first  # as ``StackOptimizer`` does
    param = torch.from_numpy(values.copy())
    optimizer = optimizer_of(name, param)
    for step in range(1, 5):
        grad = rng.standard_normal(size).astype("f4")
        grad[0] = 0 if step < 3 else grad[0]
        param.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        move_now(kind, whole[:size], grad, first, second, settings_at(step))
        np.testing.assert_allclose(whole[:size], param.numpy(), rtol=2e-6, atol=2e-6)
    assert np.isnan(whole[size:]).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("wide", [1, PANEL, 2 * PANEL + 3])
@pytest.mark.parametrize("num", [1, UNITS, UNITS + 3])
def test_weights_move_as_by_torch_and_the_norm_before_gets_its_gradients(
    name: str, wide: int, num: int
) -> None:
    """Gradients by autograd of a batch norm's affine part and a linear layer, in float64."""
    rng, kind = np.random.default_rng(wide + num), OPTIMIZERS.index(name)

    def draw(*shape: int) -> _Floats:
        return rng.standard_normal(shape).astype("f4")

    weights, scale, shift = draw(num, wide), draw(wide), draw(wide)
    first = np.zeros_like(weights)
    second = np.zeros_like(weights) if name != "sgd" else first
    param = torch.from_numpy(weights.copy())
    optimizer = optimizer_of(name, param)
    for step, num_rows in enumerate((5, 32, 1, DEPTH, 2 * DEPTH + 3), 1):
        rows, grad = draw(num_rows, wide), draw(num, num_rows)
        leaves = [torch.from_numpy(a).double().requires_grad_() for a in (weights, scale, shift)]
        seen = torch.from_numpy(rows).double() * leaves[1] + leaves[2]
        (seen @ leaves[0].T).backward(torch.from_numpy(grad.T.copy()).double())
        of_weights, of_scale, of_shift = (leaf.grad for leaf in leaves if leaf.grad is not None)
        before = draw(2, wide)
        norm_grads = before.copy()
        param.copy_(torch.from_numpy(weights))
        param.grad = of_weights.float()
        optimizer.step()
        move_weights_now(
            kind, grad, rows, grad.sum(1), scale, shift, norm_grads, weights, first, second,
            settings_at(step),
        )  # fmt: skip
        expected = torch.stack([of_scale, of_shift]).numpy()
        np.testing.assert_allclose(norm_grads - before, expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(weights, param.numpy(), rtol=2e-5, atol=2e-5)
