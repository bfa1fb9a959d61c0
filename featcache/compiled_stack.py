"""Training steps of a stack by compiled code: float32 on the CPU, when they are many.

The formulas are those of ``HeadStack.backward``, ``loss`` and ``StackOptimizer``, which all else
takes.
Whether a training is worth it depends on its size alone, never on time: the same training takes the
same steps every time, to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import threadpoolctl
import torch
from torch import Tensor

from featcache.optimizer import OPTIMIZERS, StackOptimizer
from featcache.stack import HeadStack

if TYPE_CHECKING:
    from types import ModuleType

WORTH_PARAM_STEPS = 5e8
"""Parameters times steps from which compiled steps pay for being loaded (0.7 s)."""


def load_kernels() -> ModuleType | None:
    """Return the compiled functions, or None where they cannot be had.

    The first time on a machine they are compiled, which takes some ten seconds.
    """
    try:
        from featcache import head_kernels
    except Exception:  # noqa: BLE001 (a Python too new for Numba, a compiler that fails: do without)
        return None
    return head_kernels


_NO_CLASSES, _NO_LABELS = torch.empty(0, dtype=torch.int64), torch.empty((0, 0))
_NO_WEIGHTS, _NO_MASKS = torch.empty(0), torch.empty((0, 0, 0))


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep the compiled steps' matrix products on the thread that asks for them."""
    with threadpoolctl.ThreadpoolController().select(internal_api="openblas").limit(limits=1):
        yield


class CompiledSteps:
    """Takes the steps of a stack and its optimizer.

    Args:
        kernels: From ``load_kernels``.
        stack: Whose parameters and statistics it moves; float32, on the CPU.
        optimizer: Whose moments it moves.
        class_weights: (K, C) float32: of each head's loss, as is the next.
        smoothing: K numbers.
    """

    def __init__(
        self, kernels: ModuleType, stack: HeadStack, optimizer: StackOptimizer,
        class_weights: Tensor, smoothing: Sequence[float],
    ) -> None:  # fmt: skip
        self._kernels, self._stack, self._optimizer = kernels, stack, optimizer
        self._kind, config = OPTIMIZERS.index(optimizer.kind), stack.config
        self._widths = np.array(
            [config.num_features, *config.hidden, config.num_classes], dtype=np.int64
        )
        self._moved = [
            tensor.numpy() for tensor in
            (stack.params, stack.stats, optimizer.first, optimizer.second)
        ]  # fmt: skip
        self._of_loss = class_weights.numpy(), np.array(smoothing, dtype=np.float32)

    def step(
        self, rows: Tensor, targets: Tensor, row_weights: Tensor | None, rates: Sequence[float]
    ) -> Tensor:
        """Move every head against its loss on a batch; return the losses (K,).

        Args:
            rows: (B, D), two or more.
            targets: (B,) int64, or (B, C) of 0, 1 and NaN.
            row_weights: (B,), or None.
            rates: Learning rate of each head.
        """
        stack, losses = self._stack, torch.empty(len(self._stack))
        masks = stack.draw_masks(torch.empty((len(stack), len(rows), int(self._widths[-2]))))
        classes, labels = (_NO_CLASSES, targets) if targets.ndim == 2 else (targets, _NO_LABELS)
        self._kernels.step(
            self._kind, self._widths, *self._moved, self._optimizer.next_settings(rates),
            rows.numpy(), classes.numpy(), labels.numpy(),
            (_NO_WEIGHTS if row_weights is None else row_weights).numpy(), *self._of_loss,
            (_NO_MASKS if masks is None else masks).numpy(), losses.numpy(),
        )  # fmt: skip
        stack.num_batches += 1
        return losses
