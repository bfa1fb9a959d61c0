"""A stack of heads on its rows: the draw of batches, the loss, the optimizer, validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featcache.compiled_stack import CompiledSteps
from featcache.jobs import HeadJob
from featcache.loss import (
    binary_cross_entropy,
    cross_entropy,
    want_classes,
    want_labels,
    weigh_classes,
)
from featcache.optimizer import StackOptimizer
from featcache.stack import HeadStack, SharedRows

FORWARD_ROWS = 8192
"""Rows that go through a head at once when it is evaluated."""

_VIEWS_SEED = 1 << 62  # another stream than that of the order

_Batch: TypeAlias = tuple[Tensor, ...]
"""What indexes features: rows (n,), and views (n,) where there are any."""


@dataclass(frozen=True)
class Rows:
    """What all heads are trained on and judged by.

    Attributes:
        features: (N, D) or (N, V, D).
        targets: (N,) int64, or (N, C) of 0, 1 and NaN = unknown: several labels a row.
        weights: (N,) of the rows, or None.
        valid_features: (M, D), or None: there is nothing to judge by.
        valid_targets: (M,) or (M, C), or None.
        names: Of the classes, for the history's columns.
        data_seed: Of the order and the views.
    """

    features: Tensor
    targets: Tensor
    weights: Tensor | None
    valid_features: Tensor | None
    valid_targets: npt.NDArray[Any] | None
    names: Sequence[str]
    data_seed: int


class Trainer:
    """A stack, its loss and its optimizer.

    Args:
        jobs: The heads; they share batches and an optimizer.
        rows: What they are trained on.
        kernels: Take the steps by compiled code, from ``compiled_stack.load_kernels``.
    """

    def __init__(
        self, jobs: Sequence[HeadJob], rows: Rows, kernels: ModuleType | None = None
    ) -> None:
        self._rows, features = rows, rows.features
        has_labels = rows.targets.ndim == 2
        self._want = want_labels if has_labels else want_classes
        self.stack = HeadStack(
            jobs[0].head, [job.head.dropout for job in jobs], [job.seed for job in jobs],
            features.device, features.dtype, binary_cross_entropy if has_labels else cross_entropy,
        )  # fmt: skip
        self._optimizer = StackOptimizer(
            jobs[0].training.optimizer, self.stack.params, self.stack.grads,
            [job.training.weight_decay for job in jobs],
        )  # fmt: skip
        num_classes = jobs[0].head.num_classes
        # Heads with one loss share what they want of a batch.
        losses = [(job.training.class_weights, job.training.label_smoothing) for job in jobs]
        self._losses = list(dict.fromkeys(losses))
        self._loss_of = [self._losses.index(loss) for loss in losses]
        self._weights = [
            weigh_classes(kind, rows.targets, num_classes, features.dtype)
            for kind, _ in self._losses
        ]
        self._kernels = kernels
        self._bind()

    def _bind(self) -> None:
        """Choose what takes the steps."""
        self._compiled = (
            None
            if self._kernels is None
            else CompiledSteps(self._kernels, self.stack, self._optimizer)
        )

    def keep(self, heads: Sequence[int]) -> None:
        """Give up all but some heads."""
        self.stack = self.stack.keep(heads)
        self._optimizer.keep(heads, self.stack.params, self.stack.grads)
        self._loss_of = [self._loss_of[head] for head in heads]
        self._bind()

    def epoch(self, batches: list[_Batch], rates: Sequence[float]) -> list[float]:
        """Take one step per batch; return each head's mean loss, batches weighed by their rows."""
        total = self._rows.features.new_zeros(len(self.stack))
        for batch in batches:
            losses = self._step(self._rows.features[batch], self._wanted(batch[0]), rates)
            total.add_(losses, alpha=len(batch[0]))
        means: list[float] = (total / sum(len(batch[0]) for batch in batches)).tolist()
        return means

    def _step(self, rows: Tensor, wanted: Tensor, rates: Sequence[float]) -> Tensor:
        """Move the heads against their losses (K,), which are returned."""
        if self._compiled is not None:
            return self._compiled.step(rows, wanted, rates)
        losses = self.stack.backward(SharedRows.of(rows), wanted)
        self._optimizer.step(rates)
        return losses

    def _wanted(self, rows: Tensor) -> Tensor:
        """Return what each head's loss wants of a batch: see module ``loss``."""
        targets, row_weights = self._rows.targets[rows], self._rows.weights
        if row_weights is not None:
            row_weights = row_weights[rows]
        wanted = [
            self._want(targets, weights, smoothing, row_weights)
            for weights, (_, smoothing) in zip(self._weights, self._losses, strict=True)
        ]
        if len(wanted) == 1:
            return wanted[0].expand(len(self.stack), *wanted[0].shape)
        return torch.stack(wanted)[self._loss_of]

    def validate(self) -> list[dict[str, Any]]:
        """Return the validation columns of each head's history row; none without such rows."""
        if self._rows.valid_features is None or self._rows.valid_targets is None:
            return [{} for _ in range(len(self.stack))]
        parts = torch.split(self._rows.valid_features, max(1, FORWARD_ROWS // len(self.stack)))
        logits = torch.cat([self.stack.forward(part).cpu() for part in parts], 1)
        return [_judge(of_head, self._rows.valid_targets, self._rows.names) for of_head in logits]


def _judge(logits: Tensor, targets: npt.NDArray[Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the validation columns of a history row from logits (M, C)."""
    logits = logits.double()
    if targets.ndim == 2:
        return _judge_labels(logits, targets, names)
    loss = functional.cross_entropy(logits, torch.from_numpy(targets.astype(np.int64))).item()
    right = logits.argmax(1).numpy() == targets
    recalls = {
        f"valid_recall_{name}": right[targets == i].mean().item() if (targets == i).any() else None
        for i, name in enumerate(names)
    }
    return {"valid_loss": loss, "valid_accuracy": right.mean().item(), **recalls}


def _judge_labels(
    logits: Tensor, targets: npt.NDArray[Any], names: Sequence[str]
) -> dict[str, Any]:
    """As ``_judge``, over the known targets; above 0.5 is a yes."""
    wanted = torch.from_numpy(targets.astype(np.float64))
    known = ~wanted.isnan()
    loss = functional.binary_cross_entropy_with_logits(logits[known], wanted[known]).item()
    right = (logits > 0) == (wanted == 1)
    recalls = {
        f"valid_recall_{name}": right[:, i][is_one].double().mean().item() if is_one.any() else None
        for i, (name, is_one) in enumerate(zip(names, (wanted == 1).T, strict=True))
    }
    return {
        "valid_loss": loss, "valid_accuracy": right[known].double().mean().item(), **recalls,
    }  # fmt: skip


class Draw:
    """What an epoch consists of: all rows in a new order and, of rows with views, one view each."""

    def __init__(self, features: Tensor, seed: int) -> None:
        self._features = features
        self._order = torch.Generator().manual_seed(seed)
        self._views = torch.Generator().manual_seed(seed ^ _VIEWS_SEED)

    def epoch(self, batch_size: int) -> list[_Batch]:
        """Return the batches of the next epoch."""
        num_rows, device = len(self._features), self._features.device
        rows = torch.randperm(num_rows, generator=self._order).to(device)
        parts = [torch.split(rows, batch_size)]
        if self._features.ndim == 3:
            shape, num_views = (num_rows,), self._features.shape[1]
            views = torch.randint(num_views, shape, generator=self._views).to(device)
            parts.append(torch.split(views, batch_size))
        batches: list[_Batch] = list(zip(*parts, strict=True))
        if len(batches[-1][0]) == 1:  # batch norm cannot train on one row (pytorch#4534)
            batches.pop()
        return batches
