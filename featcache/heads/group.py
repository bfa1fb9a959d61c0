"""Heads that are trained on the same batches on a CPU, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from featcache.heads.batches import Array, BatchSampler, TrainingData
from featcache.heads.compiled import numpy_kernels
from featcache.heads.compiled.team import Team
from featcache.heads.compiled.training_step import Batch, TrainableHead, aligned_zeros
from featcache.heads.config import HeadJob
from featcache.heads.loss import SharedLosses, validation_columns
from featcache.heads.resuming import Snapshot
from featcache.threads import stop_if_asked

_VALID_ROWS = 512  # that go through a head at once: with their activations they stay in the cache


class HeadGroup:
    """Some heads of one batch size and number of epochs.

    Args:
        jobs: The heads.
        data: What they are trained on.
        kernels: See ``TrainableHead``.
        team: Threads that share the pieces of a step and of the validation.
    """

    def __init__(
        self, jobs: Sequence[HeadJob], data: TrainingData, kernels: Any = numpy_kernels,
        team: Team | None = None,
    ) -> None:  # fmt: skip
        self._jobs, self._data, self._kernels = list(jobs), data, kernels
        self._team = team or Team()
        self._heads = [TrainableHead(job, data.dtype, kernels, self._team) for job in jobs]
        self._sampler = BatchSampler(data, kernels.shuffle)
        self._bind()

    def _bind(self) -> None:
        data = self._data
        self._losses = SharedLosses(
            [job.training for job in self._jobs], data.targets, data.row_weights,
            self._jobs[0].head.num_classes, data.dtype,
        )  # fmt: skip

    def keep(self, places: Sequence[int]) -> None:
        """Give up all but some heads."""
        self._jobs = [self._jobs[place] for place in places]
        self._heads = [self._heads[place] for place in places]
        self._bind()

    def state(self, place: int) -> dict[str, Array]:
        """Return a copy of one head's state dict."""
        return self._heads[place].state()

    def snapshot(self) -> Snapshot:
        """Return what decides the steps to come, of a group of one head."""
        (head,) = self._heads
        arrays, masks = head.snapshot()
        return arrays, [masks, *self._sampler.generators]

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Let a group of one head go on from the arrays of a snapshot."""
        (head,) = self._heads
        head.restore(arrays)

    def train_epoch(
        self, batch_size: int, rates: Sequence[Sequence[float]],
        on_rows: Callable[[int], None] | None = None,
    ) -> list[float]:  # fmt: skip
        """Take one step per batch; return each head's mean loss, batches weighted by their rows.

        Args:
            batch_size: Of all but the last.
            rates: For each batch, the learning rate of each head.
            on_rows: Called with the rows of each batch when all heads have seen them.
        """
        totals, num_rows, rates_left = np.zeros(len(self._heads)), 0, iter(rates)
        with np.errstate(all="ignore"):  # a head that diverges is noticed by its loss
            for batch, weights in self._batches(batch_size):
                size = len(batch.normed)
                for place, (head, rate) in enumerate(
                    zip(self._heads, next(rates_left), strict=True)
                ):
                    stop_if_asked()
                    loss_weights, denominators = weights[self._losses.numbers[place]]
                    loss = head.step(batch, loss_weights, denominators, rate)
                    totals[place] += loss * size
                num_rows += size
                if on_rows is not None:
                    on_rows(size)
        assert next(rates_left, None) is None, "a rate for each batch"
        return [float(total) for total in totals / num_rows]

    def _batches(self, batch_size: int) -> Iterator[tuple[Batch, list[tuple[Array, Array]]]]:
        """Yield each batch of an epoch with the weights of its targets in each loss."""
        width = self._jobs[0].head.num_features
        normed = aligned_zeros((batch_size, width), self._data.dtype)
        mean, variance = np.empty((2, width), self._data.dtype)
        for rows, features in self._sampler.epoch(batch_size):
            weights = self._losses.weigh(rows)
            for start in range(0, len(rows), batch_size):
                part = slice(start, start + batch_size)
                batch = Batch(normed[: len(rows[part])], mean, variance)
                self._kernels.normalise_columns(features[part], *batch)
                yield batch, [(of_loss[part], shares[part]) for of_loss, shares in weights]

    def validate(self) -> list[dict[str, Any]]:
        """Return the validation columns of each head's history row; none without such rows."""
        data = self._data
        if data.valid_targets is None:
            return [{} for _ in self._heads]
        logits = [
            np.empty((data.num_valid, job.head.num_classes), data.dtype) for job in self._jobs
        ]
        num_done = 0
        for block in data.valid_blocks():
            tasks = [
                (head, part, out[num_done + i : num_done + i + len(part)])
                for head, out in zip(self._heads, logits, strict=True)
                for i in range(0, len(block), _VALID_ROWS)
                for part in [block[i : i + _VALID_ROWS]]
            ]
            self._team.run(_write_logits, tasks)
            num_done += len(block)
        return [validation_columns(part, data.valid_targets, data.names) for part in logits]


def _write_logits(head: TrainableHead, features: Array, out: Array) -> None:
    stop_if_asked()
    out[:] = head.logits(features)
