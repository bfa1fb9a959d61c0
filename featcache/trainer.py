"""A stack of heads on its rows: the loss, the optimizer, validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featcache.compiled_stack import CompiledSteps
from featcache.draw import Batch
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
from featcache.streaming import StoredFeatures

FORWARD_ROWS = 8192
"""Rows that go through a head at once when it is evaluated."""


@dataclass(frozen=True)
class Rows:
    """What all heads are trained on and judged by.

    Attributes:
        features: (N, D) or (N, V, D), on the device or in the file.
        targets: (N,) int64, or (N, C) of 0, 1 and NaN = unknown: several labels a row; on the
            device.
        weights: (N,) of the rows, or None.
        valid_features: (M, D), or None: there is nothing to judge by.
        valid_targets: (M,) or (M, C), or None.
        names: Of the classes, for the history's columns.
        data_seed: Of the order and the views.
        dtype: What is computed in.
    """

    features: Tensor | StoredFeatures
    targets: Tensor
    weights: Tensor | None
    valid_features: Tensor | StoredFeatures | None
    valid_targets: npt.NDArray[Any] | None
    names: Sequence[str]
    data_seed: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where is computed."""
        return self.targets.device


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
        self._rows = rows
        has_labels = rows.targets.ndim == 2
        self._want = want_labels if has_labels else want_classes
        self.stack = HeadStack(
            jobs[0].head, [job.head.dropout for job in jobs], [job.seed for job in jobs],
            rows.device, rows.dtype, binary_cross_entropy if has_labels else cross_entropy,
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
            weigh_classes(kind, rows.targets, num_classes, rows.dtype) for kind, _ in self._losses
        ]
        self._kernels = kernels
        self._bind()

    def _bind(self) -> None:
        """Choose what takes the steps."""
        self._compiled = None
        if self._kernels is not None:
            weights = torch.stack([self._weights[number] for number in self._loss_of])
            smoothing = [self._losses[number][1] for number in self._loss_of]
            self._compiled = CompiledSteps(
                self._kernels, self.stack, self._optimizer, weights, smoothing
            )

    def keep(self, heads: Sequence[int]) -> None:
        """Give up all but some heads."""
        self.stack = self.stack.keep(heads)
        self._optimizer.keep(heads, self.stack.params, self.stack.grads)
        self._loss_of = [self._loss_of[head] for head in heads]
        self._bind()

    def epoch(self, batches: Iterable[Batch], rates: Sequence[Sequence[float]]) -> list[float]:
        """Take one step per batch; return each head's mean loss, batches weighed by their rows.

        Args:
            batches: As drawn.
            rates: For each batch, the step size of each head.
        """
        total = torch.zeros(len(self.stack), dtype=self._rows.dtype, device=self._rows.device)
        num_rows = 0
        for (rows, features), of_heads in zip(batches, rates, strict=True):
            losses = self._step(rows, features, of_heads)
            total.add_(losses, alpha=len(rows))
            num_rows += len(rows)
        means: list[float] = (total / num_rows).tolist()
        return means

    def _step(self, rows: Tensor, features: Tensor, rates: Sequence[float]) -> Tensor:
        """Move the heads against their losses (K,), which are returned."""
        targets, row_weights = self._rows.targets[rows], self._rows.weights
        if row_weights is not None:
            row_weights = row_weights[rows]
        if self._compiled is not None:
            return self._compiled.step(features, targets, row_weights, rates)
        wanted = self._wanted(targets, row_weights)
        losses = self.stack.backward(SharedRows.of(features), wanted)
        self._optimizer.step(rates)
        return losses

    def _wanted(self, targets: Tensor, row_weights: Tensor | None) -> Tensor:
        """Return what each head's loss wants of a batch: see module ``loss``."""
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
        size = max(1, FORWARD_ROWS // len(self.stack))
        parts = (
            part
            for block in _blocks(self._rows.valid_features)
            for part in torch.split(block, size)
        )
        like = self.stack.params
        logits = torch.cat([self.stack.forward(part.to(like)).cpu() for part in parts], 1)
        return [
            judge_logits(of_head, self._rows.valid_targets, self._rows.names) for of_head in logits
        ]


def _blocks(features: Tensor | StoredFeatures) -> Iterator[Tensor]:
    if isinstance(features, Tensor):
        yield features
        return
    for i in range(0, len(features), features.block_rows):
        yield torch.from_numpy(features[i : i + features.block_rows].load())


def judge_logits(logits: Tensor, targets: npt.NDArray[Any], names: Sequence[str]) -> dict[str, Any]:
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
    """As ``judge_logits``, over the known targets; above 0.5 is a yes."""
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
