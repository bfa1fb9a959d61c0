"""Temperature: one number that makes probabilities less, or more, sure.

The probabilities become the softmax of the logits divided by it (of one class against the rest,
the sigmoid): Guo and others, 2017, "On calibration of modern neural networks". It is fitted by the
log loss. Which class is the most probable never changes; for three classes or more, the order of
the rows by one class's probability may.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.metrics.rates import number_groups

LEAST_POSITIVE = 30
"""Positive units below which no temperature is fitted."""

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0

_NUM_FOLDS = 5
_TINY = 1e-300  # a probability of 0 has no logarithm

Probs = npt.NDArray[np.float64]
Targets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Calibration:
    """A temperature, and whether it helps on rows that did not fit it.

    Attributes:
        temperature: Fitted on all rows.
        log_loss: Mean over the rows, without a temperature.
        log_loss_out_of_fold: With the temperatures of five folds, each applied to the rows outside
            its own.
    """

    temperature: float
    log_loss: float
    log_loss_out_of_fold: float

    @property
    def is_at_limit(self) -> bool:
        """Whether the temperature runs to a limit: of rows that are all right it has no lowest."""
        return not 1.01 * MIN_TEMPERATURE < self.temperature < 0.99 * MAX_TEMPERATURE

    @property
    def helps(self) -> bool:
        """Whether it lowers the log loss out of fold, and is not at a limit."""
        return self.log_loss_out_of_fold < self.log_loss and not self.is_at_limit


def apply_temperature(probs: Probs, temperature: float) -> Probs:
    """Return probabilities (n, C) at a temperature; the rows still sum to 1.

    For the sigmoid of one class, give its probability and the rest as two columns.

    Raises:
        DataError: If the temperature is not above 0.
    """
    if not 0 < temperature < math.inf:
        raise DataError("temperature", expected="a number above 0", found=temperature)
    scaled = np.log(np.maximum(probs, _TINY)) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    powers = np.exp(scaled)
    softened: Probs = powers / powers.sum(axis=1, keepdims=True)
    return softened


def fit_temperature(probs: Probs, targets: Targets) -> float:
    """Return the temperature with the lowest log loss, from 0.05 to 20.

    Args:
        probs: (n, C) probabilities, n >= 1.
        targets: (n,) class indices.
    """
    from scipy.optimize import minimize_scalar

    logs = np.log(np.maximum(probs, _TINY))
    of_target = logs[np.arange(len(targets)), targets][:, None]

    def loss(log_temperature: float) -> float:
        scaled = (logs - of_target) / math.exp(log_temperature)
        highest = scaled.max(axis=1)
        return float((highest + np.log(np.exp(scaled - highest[:, None]).sum(axis=1))).mean())

    # The loss is convex in 1 / temperature, so it has one minimum in the logarithm too.
    bounds = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


def calibrate(probs: Probs, targets: Targets, groups: Sequence[str] | None) -> Calibration:
    """Return the temperature of some rows, and whether it helps on rows that did not fit it.

    Args:
        probs: (n, C) probabilities, n >= 5.
        targets: (n,) class indices.
        groups: n names, empty for a row without a group; None where there are none. Rows of a group
            are in one fold.
    """
    fold_of = _deal_folds(targets, groups)
    softened = np.empty_like(probs)
    for fold in range(_NUM_FOLDS):
        inside = fold_of == fold
        if inside.all() or not inside.any():
            softened[inside] = probs[inside]
            continue
        temperature = fit_temperature(probs[~inside], targets[~inside])
        softened[inside] = apply_temperature(probs[inside], temperature)
    before, after = mean_log_loss(probs, targets), mean_log_loss(softened, targets)
    return Calibration(fit_temperature(probs, targets), before, after)


def mean_log_loss(probs: Probs, targets: Targets) -> float:
    """Return the mean of -log of the probability of the right class."""
    right = probs[np.arange(len(targets)), targets]
    return float(-np.log(np.maximum(right, _TINY)).mean())


def _deal_folds(targets: Targets, groups: Sequence[str] | None) -> npt.NDArray[np.int64]:
    """Return a fold of each row: groups in one, dealt in turn within each class."""
    num_rows = len(targets)
    units = number_groups(groups or [""] * num_rows)
    _, first = np.unique(units, return_index=True)
    order = np.lexsort((first, targets[first]))  # by class, then by row
    folds = np.empty(len(first), np.int64)
    folds[order] = np.arange(len(first)) % _NUM_FOLDS
    of_rows: npt.NDArray[np.int64] = folds[units]
    return of_rows
