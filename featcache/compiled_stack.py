"""Training steps of a stack by compiled code: float32 on the CPU, when they are many.

The formulas are those of ``HeadStack.backward`` and ``StackOptimizer``, which all else takes.
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
    """

    def __init__(self, kernels: ModuleType, stack: HeadStack, optimizer: StackOptimizer) -> None:
        self._kernels, self._stack, self._optimizer = kernels, stack, optimizer
        config = stack.config
        self._widths = np.array(
            [config.num_features, *config.hidden, config.num_classes], dtype=np.int64
        )
        self._heads = [
            tuple(tensor[head].numpy() for tensor in
                  (stack.params, stack.stats, optimizer.first, optimizer.second))
            for head in range(len(stack))
        ]  # fmt: skip
        self._kept = np.empty((len(stack), 0), np.float32)

    def step(self, rows: Tensor, wanted: Tensor, rates: Sequence[float]) -> Tensor:
        """Move every head against its loss on a batch; return the losses (K,).

        Args:
            rows: (B, D), two or more.
            wanted: See ``HeadStack.backward``.
            rates: Learning rate of each head.
        """
        kernels, widths, stack, (num_rows, num_features) = (
            self._kernels, self._widths, self._stack, rows.shape,
        )  # fmt: skip
        normed = np.empty((num_rows, num_features), np.float32)
        mean, variance = np.empty((2, num_features), np.float32)
        kernels.normalise(rows.numpy(), normed, mean, variance)
        size = kernels.kept_size(widths, num_rows)
        if self._kept.shape[1] != size:
            self._kept = np.empty((len(stack), size), np.float32)
        logits = torch.empty((len(stack), num_rows, int(widths[-1])))
        masks = stack.draw_masks(torch.empty((len(stack), num_rows, int(widths[-2]))))
        factors = [np.empty((0, 0), np.float32)] * len(stack) if masks is None else masks.numpy()
        for head, (params, stats, _, _) in enumerate(self._heads):
            kernels.forward(
                widths, params, stats, normed, mean, variance, factors[head], self._kept[head],
                logits[head].numpy(),
            )  # fmt: skip
        losses, grads = stack.loss(logits, wanted)
        settings, kind = self._optimizer.next_settings(rates), self._optimizer.kind
        for head, (params, _, first, second) in enumerate(self._heads):
            kernels.backward(
                OPTIMIZERS.index(kind), widths, params, first, second, settings[head], normed,
                factors[head], grads[head].numpy(), self._kept[head],
            )  # fmt: skip
        stack.num_batches += 1
        return losses
