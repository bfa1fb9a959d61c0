"""One pass: heads that share batches are trained side by side, epoch by epoch.

Each keeps its history and the weights of its best epoch; one that has diverged, has no patience
left or is given up leaves the pass, and the others go on the faster.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.heads.batches import TrainingData
from featcache.heads.compiled import numpy_kernels
from featcache.heads.compiled.team import Team
from featcache.heads.config import LBFGS, FitResult, HeadJob, TrainingConfig
from featcache.heads.group import HeadGroup
from featcache.heads.resuming import SavedTraining
from featcache.heads.scaling import ColumnScaling
from featcache.heads.streaming import StoredFeatures
from featcache.runtime import Device

if TYPE_CHECKING:
    from featcache.heads.stack import StackTrainer


class History:
    """The epochs of one head so far, and the best of them."""

    def __init__(self, number: int, training: TrainingConfig) -> None:
        self.number, self.training = number, training
        self.is_over = False
        self._history: list[dict[str, Any]] = []
        self._state: dict[str, npt.NDArray[Any]] = {}
        self._best_epoch, self._lowest_epoch, self._lowest_loss = 0, 0, math.inf
        self._diverged_in: int | None = None

    def note(self, row: dict[str, Any], copy_state: Callable[[], dict[str, Any]]) -> bool:
        """Take in an epoch; return whether all is finite. Keeps the state if it is best."""
        epoch, loss = row["epoch"], row.get("valid_loss", row["train_loss"])
        if not math.isfinite(row["train_loss"] + loss):
            return self._give_up(epoch)
        is_lowest = loss < self._lowest_loss
        if "valid_loss" not in row or is_lowest:
            state = copy_state()
            if not are_finite(state.values()):
                return self._give_up(epoch)
            self._best_epoch, self._state = epoch, state
        if is_lowest:
            self._lowest_epoch, self._lowest_loss = epoch, loss
        patience = self.training.patience
        self.is_over = patience is not None and epoch - self._lowest_epoch >= patience
        self._history.append(row)
        return True

    def _give_up(self, epoch: int) -> bool:
        self.is_over, self._diverged_in = True, epoch
        return False

    def result(self) -> FitResult:
        """Return the history and the weights of the best epoch."""
        return FitResult(self._state, self._history, self._best_epoch, self._diverged_in)


def fit_pass(  # noqa: PLR0917
    numbers: Sequence[int], kernels: Any, team: Team, jobs: Sequence[HeadJob],
    scalings: Sequence[ColumnScaling | None], data: TrainingData, device: Device,
    tell: Callable[[int, dict[str, Any]], bool], tell_share: Callable[[float], None],
    saved: SavedTraining | None,
) -> dict[int, FitResult]:  # fmt: skip
    """Train some heads that share batches; return their results by number, of scaled features."""
    training = jobs[numbers[0]].training
    data = dataclasses.replace(data, scaling=scalings[numbers[0]])
    if training.optimizer == LBFGS:
        from featcache.heads.linear_probe import fit_linear_probe

        results = dict[int, FitResult]()
        for n in numbers:
            results[n] = fit_linear_probe(jobs[n], data, functools.partial(tell, n))
            tell_share(1.0)
        return results
    trainer: HeadGroup | StackTrainer
    if device.type == "cpu":
        trainer = HeadGroup([jobs[number] for number in numbers], data, kernels, team)
    else:
        from featcache.heads.stack import StackTrainer

        trainer = StackTrainer([jobs[number] for number in numbers], data, device.torch())
    batch_size = training.rows_per_step(len(data.targets))
    num_steps = training.steps_per_epoch(len(data.targets))
    heads = everyone = [History(number, jobs[number].training) for number in numbers]
    first = 1
    if saved is not None:
        (head,) = heads
        first += _resume(saved, trainer, head, kernels, data, tell)
        if first > 1:
            tell_share((first - 1) / training.epochs)
    for epoch in range(first, training.epochs + 1):
        start = time.perf_counter()
        rates = [
            [head.training.learning_rate_at(epoch, step / num_steps) for head in heads]
            for step in range(1, num_steps + 1)
        ]
        row_share = len(heads) / training.epochs / len(data.targets)
        on_rows = functools.partial(_tell_rows, tell_share, row_share)
        losses = trainer.train_epoch(batch_size, rates, on_rows)
        valid = trainer.validate()
        seconds = time.perf_counter() - start
        for place, (head, rate, loss) in enumerate(zip(heads, rates[-1], losses, strict=True)):
            row = {"epoch": epoch, "train_loss": loss, **valid[place]}
            row |= {"learning_rate": rate, "seconds": seconds}
            is_finite = head.note(row, functools.partial(trainer.state, place))
            if is_finite and tell(head.number, row):
                head.is_over = True
        left = [place for place, head in enumerate(heads) if not head.is_over]
        if not left:
            break
        if len(left) < len(heads):  # fewer heads, faster epochs
            trainer.keep(left)
            heads = [heads[place] for place in left]
        if saved is not None and epoch < training.epochs:
            saved.keep(trainer, heads[0].result())
    return {head.number: head.result() for head in everyone}


def _tell_rows(tell_share: Callable[[float], None], share: float, num_rows: int) -> None:
    tell_share(num_rows * share)


def _resume(  # noqa: PLR0917
    saved: SavedTraining, trainer: HeadGroup | StackTrainer, head: History, kernels: Any,
    data: TrainingData, tell: Callable[[int, dict[str, Any]], bool],
) -> int:  # fmt: skip
    """Go on from what is kept; return how many epochs that were. They are told again."""
    block_rows = data.features.block_rows if isinstance(data.features, StoredFeatures) else None
    how = {"compiled": kernels is not numpy_kernels, "block_rows": block_rows}
    columns = ["epoch", "train_loss"]
    if data.valid_targets is not None:
        columns += ["valid_loss", "valid_accuracy", *(f"valid_recall_{n}" for n in data.names)]
    columns += ["learning_rate", "seconds"]
    history, best = saved.load(trainer, how, columns, head.training.epochs)
    for row in history:
        head.note(row, lambda: best)
        tell(head.number, row)
    return head.training.epochs if head.is_over else len(history)


def are_finite(arrays: Iterable[npt.NDArray[Any]]) -> bool:
    """Return whether no value is NaN or infinite."""
    return all(np.isfinite(array).all() for array in arrays)
