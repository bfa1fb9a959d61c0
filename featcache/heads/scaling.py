"""An exact standardisation of features, for where the head's batch norm alone would go wrong.

A batch norm divides by sqrt(variance + 1e-5): a column whose spread is 1e-4 comes out 30 times too
small. And its running mean starts at 0: after 20 steps an eighth of each column's mean is missing.
Where either matters, heads are trained on standardised rows, and the standardisation is then folded
into their first batch norm, so that the saved head is the same ``nn.Sequential``, of raw features.
Elsewhere features are left alone, and the training is the tutorial's bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.heads.config import LBFGS, TrainingConfig
from featcache.heads.head import BATCH_NORM_EPS, BATCH_NORM_MOMENTUM
from featcache.heads.streaming import StoredFeatures

Array = npt.NDArray[Any]

LARGEST = 1e18
"""Of a feature: the square of a larger one does not fit in float32, nor does its variance."""

_TINY_SPREAD = 0.005
"""Below it the eps of the batch norm makes a column smaller by 15 % or more. (At 0.003 by 30 %: 300
rows with the classes in 2 of 20 such columns scored 0.88 instead of 0.94.) It is multiplied by the
share of rows in which the column is not 0, because a rarely active column has a small spread at any
scale: on X-rays 1 to 7 of EfficientNet-Lite0's 1280 columns are below 0.003, and active in 1 to 7 %
of the rows. Their least spread / share was 0.011, over 600 subsets of 170 rows and more."""

_MEAN_LEFT = 0.1
"""What may be missing of the running means at the end, in spreads, as the root of the mean square
over the columns: by so much a unit's input is off, in its own spreads. On 60 rows x 20, 0.04 cost
0.2 points of accuracy, 0.12 cost one, 0.24 four. On X-rays it is 0.001 after 10 epochs of 200 rows,
0.005 of 160."""

_MEAN_LEFT_EARLY = 0.3  # where patience may end it: on 200 X-rays 0.05 after 4 epochs

_SMALLEST_SPREAD = 1e-30  # one that is smaller has no inverse in float32
_LARGEST_VARIANCE = 1e37  # that float32 holds
_ROWS_AT_ONCE = 128  # in float64 they stay in the cache


@dataclass(frozen=True)
class ColumnScaling:
    """The map (x - mean) * inverse of each column.

    Attributes:
        mean: (D,) of the dtype that is computed in.
        inverse: (D,) 1 / spread, likewise; 0 for a column that never varies.
    """

    mean: Array
    inverse: Array

    def apply(self, features: Array) -> Array:
        """Return features (n, D) or (n, V, D) standardised, as a new array."""
        rows = np.subtract(features, self.mean, dtype=self.mean.dtype)
        rows *= self.inverse
        return rows

    def fold(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """Return a head of standardised rows as one of raw features, by its first batch norm.

        A column that never varied in the training rows is ignored from then on.

        Args:
            state: The head's state dict.
        """
        mean, variance, weight = (
            state[f"0.{name}"].astype(np.float64)
            for name in ("running_mean", "running_var", "weight")
        )
        centre, inverse = self.mean.astype(np.float64), self.inverse.astype(np.float64)
        varies = inverse > 0
        spread = 1 / np.where(varies, inverse, 1)
        dtype = self.mean.dtype
        variances = np.minimum(variance * spread**2, _LARGEST_VARIANCE).astype(dtype)
        gain = inverse * weight / np.sqrt(variance + BATCH_NORM_EPS)
        return dict(state) | {
            "0.running_mean": (centre + mean * spread).astype(dtype),
            "0.running_var": variances,
            "0.weight": (gain * np.sqrt(variances.astype(np.float64) + BATCH_NORM_EPS)).astype(
                dtype
            ),
        }


@dataclass(frozen=True)
class Columns:
    """What is known of each column of the training features, over all rows and views.

    Attributes:
        mean: (D,) float64.
        spread: (D,) float64, the standard deviation.
        active: (D,) the share of rows in which it is not 0.
        num_rows: N.
    """

    mean: Array
    spread: Array
    active: Array
    num_rows: int

    @classmethod
    def measure(cls, features: Array | StoredFeatures) -> Columns:
        """Read all rows once, in float64.

        Raises:
            DataError: If a feature is not finite or beyond 1e18, which no head can be trained on.
        """
        total, squares, active = np.zeros((3, features.shape[-1]))
        origin, count = np.zeros_like(total), 0
        for rows in _blocks("training rows", features):
            # Sums of distances from one of the rows: exactly 0 for a column that never varies.
            origin = origin if count else rows[0].astype(np.float64)
            distances = rows - origin
            total += distances.sum(0)
            squares += np.einsum("nd,nd->d", distances, distances)
            active += np.count_nonzero(rows, 0)
            count += len(rows)
        mean = total / count
        variance = np.maximum(squares / count - mean**2, 0)
        return cls(origin + mean, np.sqrt(variance), active / count, len(features))

    def scaling(self, dtype: npt.DTypeLike) -> ColumnScaling:
        """Return the standardisation of the columns."""
        varies = self.spread > _SMALLEST_SPREAD
        inverse = np.where(varies, 1 / np.where(varies, self.spread, 1), 0)
        return ColumnScaling(self.mean.astype(dtype), inverse.astype(dtype))

    def need_scaling(self, training: TrainingConfig) -> bool:
        """Whether a training would go wrong on the columns as they are.

        By the planned number of epochs: the answer does not depend on how a training goes.
        """
        if (self.spread < _TINY_SPREAD * self.active).any():
            return True
        varies = self.spread > 0
        squares = (self.mean[varies] / self.spread[varies]) ** 2
        ratio = math.sqrt(squares.sum() / len(varies))
        epochs, patience = training.epochs, training.patience
        planned = [(epochs, _MEAN_LEFT)]
        if patience is not None:
            planned.append((min(epochs, patience + 1), _MEAN_LEFT_EARLY))
        kept_per_epoch = (1 - BATCH_NORM_MOMENTUM) ** training.steps_per_epoch(self.num_rows)
        return any(kept_per_epoch**number * ratio > most for number, most in planned)


def choose_scalings(
    trainings: Sequence[TrainingConfig], features: Array | StoredFeatures, dtype: npt.DTypeLike
) -> list[ColumnScaling | None]:
    """Return how each training takes the features; None as they are.

    A linear probe is always solved for on standardised rows.

    Args:
        trainings: Each alone decides on its own.
        features: (N, D) or (N, V, D), to train on.
        dtype: What is computed in.

    Raises:
        DataError: If a feature is not finite or beyond 1e18, which no head can be trained on.
    """
    columns = Columns.measure(features)
    scaling = columns.scaling(dtype)
    return [
        scaling if training.optimizer == LBFGS or columns.need_scaling(training) else None
        for training in trainings
    ]


def check_sizes(what: str, features: Array | StoredFeatures) -> None:
    """Check that all features are numbers that a head can compute with.

    Raises:
        DataError: If one is not finite or beyond 1e18.
    """
    for _ in _blocks(what, features):
        pass


def _blocks(what: str, features: Array | StoredFeatures) -> Iterator[Array]:
    """Yield checked rows (n, D), views as rows of their own."""
    step = len(features)
    if isinstance(features, StoredFeatures):
        step = max(1, features.block_rows // math.prod(features.shape[1:-1]))
    for start in range(0, len(features), step):
        block = features[start : start + step]
        rows = block.load() if isinstance(block, StoredFeatures) else block
        flat = rows.reshape(-1, rows.shape[-1])
        for i in range(0, len(flat), _ROWS_AT_ONCE):
            part = flat[i : i + _ROWS_AT_ONCE]
            _check(what, part)
            yield part


def _check(what: str, rows: Array) -> None:
    with np.errstate(invalid="ignore"):
        largest = np.maximum(rows.max(0), -rows.min(0)).astype(np.float64)
        bad = ~(largest <= LARGEST)
    if bad.any():
        column = int(bad.argmax())
        raise DataError(
            what, expected=f"features from {-LARGEST:g} to {LARGEST:g}",
            found=f"{largest[column]:.3g} in column {column} (from 0)",
            hint="Leave that column out or scale it down",
        )  # fmt: skip
