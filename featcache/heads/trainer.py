"""A stack of heads on its rows: the loss, the optimizer, validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featcache.heads.batches import Drawn
from featcache.heads.compiled_stack import Batches, CompiledSteps
from featcache.heads.config import HeadJob
from featcache.heads.loss import (
    binary_cross_entropy,
    cross_entropy,
    want_classes,
    want_labels,
    weigh_classes,
)
from featcache.heads.optimizer import StackOptimizer
from featcache.heads.stack import HeadStack, SharedRows
from featcache.heads.streaming import StoredFeatures
from featcache.threads import Threads

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
        partner: See ``CompiledSteps``.
    """

    def __init__(
        self, jobs: Sequence[HeadJob], rows: Rows, kernels: ModuleType | None = None,
        partner: Threads | None = None,
    ) -> None:  # fmt: skip
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
        self._kernels, self._partner = kernels, partner
        self._bind()

    def _bind(self) -> None:
        """Choose what takes the steps."""
        self._compiled = None
        if self._kernels is not None:
            weights = torch.stack([self._weights[number] for number in self._loss_of])
            smoothing = [self._losses[number][1] for number in self._loss_of]
            self._compiled = CompiledSteps(
                self._kernels, self.stack, self._optimizer, weights, smoothing, self._partner
            )

    def keep(self, heads: Sequence[int]) -> None:
        """Give up all but some heads."""
        self.stack = self.stack.keep(heads)
        self._optimizer.keep(heads, self.stack.params, self.stack.grads)
        self._loss_of = [self._loss_of[head] for head in heads]
        self._bind()

    def epoch(
        self, drawn: Iterable[Drawn], batch_size: int, rates: Sequence[Sequence[float]]
    ) -> list[float]:
        """Take one step per batch; return each head's mean loss, batches weighed by their rows.

        Args:
            drawn: Some batches at once.
            batch_size: Of all but the last.
            rates: For each batch, the step size of each head.
        """
        total = torch.zeros(len(self.stack), dtype=self._rows.dtype, device=self._rows.device)
        num_steps, num_rows, order = 0, 0, iter(drawn)
        # Those after these: drawn while these are trained on.
        ahead = [self._draw(order, batch_size)]
        while (batches := ahead.pop()) is not None:
            sizes = np.diff(batches.ends, prepend=0).tolist()
            of_steps = rates[num_steps : num_steps + len(sizes)]
            losses = self._take(
                batches, of_steps, lambda: ahead.append(self._draw(order, batch_size))
            )
            for of_heads, size in zip(losses, sizes, strict=True):
                total.add_(of_heads, alpha=size)
            num_steps, num_rows = num_steps + len(sizes), num_rows + sum(sizes)
        assert num_steps == len(rates), "a rate for each batch"
        means: list[float] = (total / num_rows).tolist()
        return means

    def _draw(self, order: Iterator[Drawn], batch_size: int) -> Batches | None:
        """Return the next batches with all that steps take, None at the end of the epoch."""
        drawn = next(order, None)
        if drawn is None:
            return None
        numbers, rows = drawn
        ends = np.array([*range(batch_size, len(rows), batch_size), len(rows)], np.int64)
        row_weights = None if self._rows.weights is None else self._rows.weights[numbers]
        masks = None if self._compiled is None else self._compiled.draw_masks(ends)
        return Batches(ends, rows, self._rows.targets[numbers], row_weights, masks)

    def _take(
        self, batches: Batches, rates: Sequence[Sequence[float]], meanwhile: Callable[[], None]
    ) -> Sequence[Tensor]:
        """Move the heads against their losses on some batches; return those (K,) of each."""
        if self._compiled is not None:
            return list(self._compiled.take(batches, rates, meanwhile))
        losses, start = list[Tensor](), 0
        for end, of_heads in zip(batches.ends.tolist(), rates, strict=True):
            weights = None if batches.row_weights is None else batches.row_weights[start:end]
            wanted = self._wanted(batches.targets[start:end], weights)
            losses.append(self.stack.backward(SharedRows.of(batches.rows[start:end]), wanted))
            self._optimizer.step(of_heads)
            start = end
        meanwhile()
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
        logits = torch.cat(
            [part for block in _blocks(self._rows.valid_features) for part in self._forward(block)],
            1,
        )
        return [
            judge_logits(of_head, self._rows.valid_targets, self._rows.names) for of_head in logits
        ]

    def _forward(self, block: Tensor) -> list[Tensor]:
        """Return logits (K, n, C) of parts of a block, by the partner too if there is one.

        Two parts at least, for a cut may change the last bit, and who computes must not.
        """
        size = max(1, min(FORWARD_ROWS // len(self.stack), math.ceil(len(block) / 2)))
        like = self.stack.params

        def forward(part: Tensor) -> Tensor:
            return self.stack.forward(part.to(like)).cpu()

        parts = torch.split(block, size)
        if self._partner is None:
            return [forward(part) for part in parts]
        others = [self._partner.submit(forward, part) for part in parts[1::2]]
        logits = [forward(part) for part in parts[::2]]
        for place, other in enumerate(others):
            logits.insert(2 * place + 1, other.result())
        return logits


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
