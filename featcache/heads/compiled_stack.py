"""Training steps of a stack by compiled code: float32 on the CPU, when they are many.

The formulas are those of ``HeadStack.backward``, ``loss`` and ``StackOptimizer``, which all else
takes. Whether a training is worth it depends on its size alone, never on time: the same training
takes the same steps every time, to the last bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.heads.config import LBFGS, OPTIMIZERS, HeadJob
from featcache.heads.head import count_values
from featcache.heads.optimizer import StackOptimizer
from featcache.heads.stack import HeadStack
from featcache.runtime import Say, available_cores, silent
from featcache.threads import Threads

if TYPE_CHECKING:
    from types import ModuleType

WORTH_PARAM_STEPS = 5e8
"""Parameters times steps from which compiled steps pay for being loaded (0.5 to 0.7 s)."""

WORTH_HELPER = 1e5
"""Parameters from which two threads are worth it for one head. On two Granite Rapids cores a step
took 0.8 ms for 1.2 with 0.73 M parameters, 0.45 for 0.65 with 0.33 M, 0.32 for 0.39 with 0.17 M."""

_LONG_SECONDS = 3.0
_LINE = 64  # bytes


def load_kernels(say: Say = silent) -> ModuleType | None:
    """Return the compiled functions, or None where they cannot be had.

    The first time on a machine they are compiled, which takes half a minute: that is said.
    """
    line = "compiling the training step, once on this machine: about half a minute"
    timer = threading.Timer(_LONG_SECONDS, say, [line])
    timer.daemon = True
    timer.start()
    try:
        from featcache.heads.compiled import head_kernels
    except Exception:  # noqa: BLE001 (a Python too new for Numba, a compiler that fails: do without)
        return None
    finally:
        timer.cancel()
    return head_kernels


def kernels_for(
    jobs: Sequence[HeadJob], num_rows: int, device: torch.device, dtype: torch.dtype,
    say: Say = silent,
) -> ModuleType | None:  # fmt: skip
    """Return compiled code if it can train the heads on so many rows and is worth being loaded."""
    if device.type != "cpu" or dtype != torch.float32:
        return None
    work = sum(
        job.training.epochs * job.training.steps_per_epoch(num_rows) * count_values(job.head)
        for job in jobs
        if job.training.optimizer != LBFGS
    )
    return load_kernels(say) if work >= WORTH_PARAM_STEPS else None


def partner_for(jobs: Sequence[HeadJob]) -> contextlib.AbstractContextManager[Threads | None]:
    """Return a thread to help with each compiled step, if there is one head and it is large."""
    if len(jobs) == 1 and available_cores() > 1 and count_values(jobs[0].head) >= WORTH_HELPER:
        return Threads("fit", 1, wait=True)
    return contextlib.nullcontext()


_NO_CLASSES, _NO_LABELS = torch.empty(0, dtype=torch.int64), torch.empty((0, 0))
_NONE = torch.empty(0)


@dataclass(frozen=True)
class Batches:
    """What some steps are taken on, one after the other.

    Attributes:
        ends: (S,) int64: where each batch ends; two rows or more are in each.
        rows: (N, D) features.
        targets: (N,) int64, or (N, C) of 0, 1 and NaN.
        row_weights: (N,), or None.
        masks: From ``CompiledSteps.draw_masks``, or None.
    """

    ends: npt.NDArray[np.int64]
    rows: Tensor
    targets: Tensor
    row_weights: Tensor | None
    masks: Tensor | None


def _aligned(size: int) -> npt.NDArray[np.float32]:
    """Return ``size`` numbers that begin with a cache line: vectors that lie across two cost both.

    Of a step of 1.15 ms on one Xeon core that is 0.04.
    """
    numbers = np.empty(size + _LINE // 4, np.float32)
    start = -numbers.ctypes.data % _LINE // 4
    return numbers[start : start + size]


class CompiledSteps:
    """Takes the steps of a stack and its optimizer.

    Args:
        kernels: From ``load_kernels``.
        stack: Whose parameters and statistics it moves; float32, on the CPU.
        optimizer: Whose moments it moves.
        class_weights: (K, C) float32: of each head's loss, as is the next.
        smoothing: K numbers.
        partner: Of one head, a thread that helps with each step; the result is the same.
    """

    def __init__(  # noqa: PLR0917
        self, kernels: ModuleType, stack: HeadStack, optimizer: StackOptimizer,
        class_weights: Tensor, smoothing: Sequence[float], partner: Threads | None = None,
    ) -> None:  # fmt: skip
        self._kernels, self._stack, self._optimizer = kernels, stack, optimizer
        self._partner = partner
        if partner is not None:
            partner.submit(torch.set_num_threads, 1).result()  # a number that each thread has
        self._kind, config = OPTIMIZERS.index(optimizer.kind), stack.config
        self._widths = np.array(
            [config.num_features, *config.hidden, config.num_classes], dtype=np.int64
        )
        self._moved = [
            tensor.numpy() for tensor in
            (stack.params, stack.stats, optimizer.first, optimizer.second)
        ]  # fmt: skip
        self._space = np.empty(0, np.float32)
        self._of_loss = class_weights.numpy(), np.array(smoothing, dtype=np.float32)

    def draw_masks(self, ends: npt.NDArray[np.int64]) -> Tensor | None:
        """Return the next dropout masks for ``Batches``, flat."""
        wide = len(self._stack) * int(self._widths[-2])
        masks = torch.empty(int(ends[-1]) * wide)
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            of_batch = masks[start * wide : end * wide]
            if self._stack.draw_masks(of_batch.view(len(self._stack), end - start, -1)) is None:
                return None
        return masks

    def take(
        self, batches: Batches, rates: Sequence[Sequence[float]], meanwhile: Callable[[], None]
    ) -> Tensor:
        """Move every head against its loss on some batches; return the losses (S, K).

        Args:
            batches: S of them.
            rates: Of each step the learning rate of each head.
            meanwhile: Called once; by the partner if there is one, which then helps.
        """
        assert len(rates) == len(batches.ends), "rates for each batch"
        kernels, stack = self._kernels, self._stack
        losses = torch.empty(len(rates), len(stack))
        largest = int(np.diff(batches.ends, prepend=0).max())
        size = kernels.space_size(self._widths, largest)
        if len(self._space) < size:
            self._space = _aligned(size)
        targets, row_weights = batches.targets, batches.row_weights
        classes, labels = (_NO_CLASSES, targets) if targets.ndim == 2 else (targets, _NO_LABELS)
        arguments = (
            np.zeros(kernels.tickets.STATE_SIZE, np.int64), self._kind, self._widths, *self._moved,
            np.stack([self._optimizer.next_settings(of_heads) for of_heads in rates]),
            batches.ends, batches.rows.numpy(), classes.numpy(), labels.numpy(),
            (_NONE if row_weights is None else row_weights).numpy(), *self._of_loss,
            (_NONE if batches.masks is None else batches.masks).numpy(), self._space,
            losses.numpy(),
        )  # fmt: skip
        if self._partner is None:
            kernels.steps(kernels.LEADER, *arguments)
            meanwhile()
        else:  # a helper that still looks for pieces when all are done finds none
            other = self._partner.submit(meanwhile)
            self._partner.submit(kernels.steps, kernels.HELPER, *arguments)
            kernels.steps(kernels.LEADER, *arguments)
            other.result()
        stack.num_batches += len(rates)
        return losses
