"""The two losses, cross-entropy and binary cross-entropy, by the weights of their terms.

Each loss is a sum over a batch of weights times negative log-probabilities, divided by a
denominator. Class weights, label smoothing, row weights and unknown targets are all in the weights,
so that what computes logits and gradients knows of none of them.

Several labels a row are C yes-or-no questions, some without a known answer. The mean is over the
known answers of the batch, whatever their classes or their weights: with ``known`` of ones and
zeros and the unknown targets set to anything,

    binary_cross_entropy_with_logits(logits, targets, weight=known, reduction="sum") / known.sum()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import ConfigError
from featcache.heads.config import TrainingConfig

Array = npt.NDArray[Any]


def target_weights(
    targets: Array, class_weights: Array, smoothing: float, row_weights: Array | None
) -> tuple[Array, Array]:
    """Return the weight of each -log p in the loss, and each row's share of the denominator.

    For one class a row as in ``torch.nn.functional.cross_entropy``: the mean is over the weights of
    the targets. For several labels as in ``binary_cross_entropy_with_logits`` with ``pos_weight``:
    the mean is over the known targets, weighted by their rows alone.

    Args:
        targets: (B,) integers; or (B, C) of 0, 1 and NaN = unknown.
        class_weights: (C,) of the classes, or of the positives of each class.
        smoothing: Share of each target spread evenly over all classes, or over yes and no.
        row_weights: (B,), or None.

    Returns:
        Weights (B, C), or (B, 2 C): of -log p of each class, then of -log (1 - p); both 0 where the
        target is unknown. Then the denominators (B,), whose sum divides the loss of the batch.
    """
    if targets.ndim == 2:
        known = (~np.isnan(targets)).astype(class_weights.dtype)
        if row_weights is not None:
            known *= row_weights[:, None]
        yes = np.nan_to_num(targets).astype(known.dtype) * (1 - smoothing) + smoothing / 2
        weights = np.concatenate([yes * class_weights * known, (1 - yes) * known], 1)
        return weights, known.sum(1)
    denominators = class_weights[targets]
    weights = np.zeros((len(targets), len(class_weights)), class_weights.dtype)
    weights[np.arange(len(targets)), targets] = denominators * (1 - smoothing)
    if smoothing:
        weights += class_weights * (smoothing / len(class_weights))
    if row_weights is not None:
        weights *= row_weights[:, None]
        denominators = denominators * row_weights
    return weights, denominators


def class_weights(
    kind: str | Sequence[float], targets: Array, num_classes: int, dtype: npt.DTypeLike
) -> Array:
    """Return the weights (C,) of one class a row, or of the positives of several labels a row.

    ``balanced`` is N / (C * n) for n of N rows, and for labels the known negatives of the class
    over its known positives: 1 where it has none of either, or it would not be trained at all.

    Args:
        kind: ``none``, ``balanced`` or C numbers.
        targets: (N,) integers, or (N, C) of 0, 1 and NaN.
        num_classes: C.
        dtype: Of the weights.

    Raises:
        ConfigError: If there are not C numbers.
    """
    if kind == "none":
        return np.ones(num_classes, dtype)
    if kind != "balanced":
        if len(kind) != num_classes:
            found = len(kind)
            raise ConfigError("--class-weights", expected=f"{num_classes} numbers", found=found)
        return np.array(kind, dtype)
    if targets.ndim == 2:
        num_yes, num_no = ((targets == answer).sum(0) for answer in (1, 0))
        has_both = (num_yes > 0) & (num_no > 0)
        return np.where(has_both, num_no / np.maximum(num_yes, 1), 1).astype(dtype)
    counts = np.bincount(targets, minlength=num_classes).clip(min=1)
    return (len(targets) / (num_classes * counts)).astype(dtype)


def validation_columns(logits: Array, targets: Array, names: Sequence[str]) -> dict[str, Any]:
    """Return the validation columns of a history row, computed in float64.

    The loss is NaN if a logit is not finite, whatever its share in the loss.

    Args:
        logits: (M, C).
        targets: (M,) integers; or (M, C) of 0, 1 and NaN: means are over the known targets, and
            above 0.5 is a yes.
        names: Of the classes.
    """
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # of a head that diverges
        if targets.ndim == 2:
            known, positive = ~np.isnan(targets), targets == 1
            right = (logits > 0) == positive
            losses = np.logaddexp(0, np.where(positive, -logits, logits))[known]
            recalls = [right[:, i][positive[:, i]] for i in range(len(names))]
            right = right[known]
        else:
            shifted = logits - logits.max(1, keepdims=True)
            of_target = shifted[np.arange(len(targets)), targets]
            losses = np.log(np.exp(shifted).sum(1)) - of_target
            right = logits.argmax(1) == targets
            recalls = [right[targets == i] for i in range(len(names))]
    return {
        "valid_loss": float(losses.mean()) if np.isfinite(logits).all() else np.nan,
        "valid_accuracy": float(right.mean()),
        **{
            f"valid_recall_{name}": float(recall.mean()) if len(recall) else None
            for name, recall in zip(names, recalls, strict=True)
        },
    }


class SharedLosses:
    """The losses of some heads; those with the same loss share its weights.

    Args:
        trainings: Of each head.
        targets: (N,) or (N, C) of all training rows.
        row_weights: (N,) or None.
        num_classes: C.
        dtype: Of the weights.

    Attributes:
        numbers: Of each head, which of the losses is its own.
    """

    def __init__(
        self, trainings: Sequence[TrainingConfig], targets: Array, row_weights: Array | None,
        num_classes: int, dtype: npt.DTypeLike,
    ) -> None:  # fmt: skip
        losses = [(training.class_weights, training.label_smoothing) for training in trainings]
        distinct = list(dict.fromkeys(losses))
        self.numbers = [distinct.index(loss) for loss in losses]
        self._targets, self._row_weights = targets, row_weights
        self._losses = [
            (class_weights(kind, targets, num_classes, dtype), smoothing)
            for kind, smoothing in distinct
        ]

    def weigh(self, rows: Array) -> list[tuple[Array, Array]]:
        """Return the ``target_weights`` of some rows, by their numbers, for each loss."""
        targets = self._targets[rows]
        row_weights = None if self._row_weights is None else self._row_weights[rows]
        return [
            target_weights(targets, weights, smoothing, row_weights)
            for weights, smoothing in self._losses
        ]
