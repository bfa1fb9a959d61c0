"""Training steps of a stack by compiled code: float32 on the CPU, when they are many.

The formulas are those of ``HeadStack.backward``, ``loss`` and ``StackOptimizer``, which all else
takes. Whether a training is worth it depends on its size alone, never on time: the same training
takes the same steps every time, to the last bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import threadpoolctl
import torch
from torch import Tensor

from featcache.head import count_values
from featcache.jobs import LBFGS, HeadJob
from featcache.optimizer import OPTIMIZERS, StackOptimizer
from featcache.runtime import Say, available_cores, silent
from featcache.stack import HeadStack
from featcache.threads import Threads

if TYPE_CHECKING:
    from types import ModuleType

WORTH_PARAM_STEPS = 5e8
"""Parameters times steps from which compiled steps pay for being loaded (0.7 s)."""

WORTH_HELPER = 2e5
"""Parameters from which two threads are worth it for one head. On two Sapphire Rapids cores a step
took 1.3 ms for 2.1 with 0.73 M parameters, 0.8 for 1.1 with 0.33 M, 0.6 for 0.67 with 0.17 M."""

_LONG_SECONDS = 3.0


def load_kernels(say: Say = silent) -> ModuleType | None:
    """Return the compiled functions, or None where they cannot be had.

    The first time on a machine they are compiled, which takes half a minute: that is said.
    """
    line = "compiling the training step, once on this machine: about half a minute"
    timer = threading.Timer(_LONG_SECONDS, say, [line])
    timer.daemon = True
    timer.start()
    try:
        from featcache import head_kernels
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
_NO_WEIGHTS, _NO_MASKS = torch.empty(0), torch.empty((0, 0, 0))


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep the compiled steps' matrix products on the thread that asks for them."""
    with threadpoolctl.ThreadpoolController().select(internal_api="openblas").limit(limits=1):
        yield


@dataclass(frozen=True)
class StepBatch:
    """What a step is taken on.

    Attributes:
        rows: (B, D) features.
        targets: (B,) int64, or (B, C) of 0, 1 and NaN.
        row_weights: (B,), or None.
        masks: (K, B, W) from ``CompiledSteps.draw_masks``, or None.
    """

    rows: Tensor
    targets: Tensor
    row_weights: Tensor | None
    masks: Tensor | None


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
        self._state = np.zeros(kernels.tickets.STATE_SIZE, np.int64)
        self._of_loss = class_weights.numpy(), np.array(smoothing, dtype=np.float32)

    def draw_masks(self, num_rows: int) -> Tensor | None:
        """Return the next dropout masks (K, num_rows, W) for ``StepBatch``."""
        width = int(self._widths[-2])
        return self._stack.draw_masks(torch.empty((len(self._stack), num_rows, width)))

    def step(
        self, batch: StepBatch, rates: Sequence[float], meanwhile: Callable[[], None]
    ) -> Tensor:
        """Move every head against its loss on a batch; return the losses (K,).

        Args:
            batch: Two rows or more.
            rates: Learning rate of each head.
            meanwhile: Called once, by the partner when it would have nothing to do.
        """
        kernels, stack, losses = self._kernels, self._stack, torch.empty(len(self._stack))
        size = kernels.space_size(self._widths, len(batch.rows))
        if len(self._space) != size:
            self._space = np.empty(size, np.float32)
        targets, row_weights = batch.targets, batch.row_weights
        classes, labels = (_NO_CLASSES, targets) if targets.ndim == 2 else (targets, _NO_LABELS)
        arguments = (
            self._state, self._kind, self._widths, *self._moved,
            self._optimizer.next_settings(rates), batch.rows.numpy(), classes.numpy(),
            labels.numpy(), (_NO_WEIGHTS if row_weights is None else row_weights).numpy(),
            *self._of_loss, (_NO_MASKS if batch.masks is None else batch.masks).numpy(),
            self._space, losses.numpy(),
        )  # fmt: skip
        self._state.fill(0)
        if self._partner is None:
            kernels.step(kernels.LEADER, 0, *arguments)
            meanwhile()
        else:
            helping = self._partner.submit(self._help, arguments, meanwhile)
            kernels.step(kernels.LEADER, 0, *arguments)
            helping.result()
        stack.num_batches += 1
        return losses

    def _help(self, arguments: tuple[Any, ...], meanwhile: Callable[[], None]) -> None:
        """Take pieces of a step of one head; do something else while there are none."""
        kernels = self._kernels
        kernels.step(kernels.HELPER, kernels.FORWARD_PIECES, *arguments)
        meanwhile()
        kernels.step(kernels.HELPER, kernels.count_pieces(self._widths), *arguments)
