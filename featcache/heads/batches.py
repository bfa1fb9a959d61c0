"""Rows of an epoch, some batches at once: each in a new order and, if it has views, one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from featcache.heads.streaming import StoredFeatures

_VIEWS_SEED, _CHUNKS_SEED = 1 << 62, 1 << 61  # other streams than that of the order

Drawn: TypeAlias = tuple[Tensor, Tensor]
"""Numbers of rows (n,) and their features (n, D): some batches, one after the other."""

_ROWS_AT_ONCE = 256
"""Rows that are drawn at once, if a batch is smaller: eight batches of 32."""


class Draw:
    """Epochs of features on the device, or of stored features in shuffled blocks.

    In blocks, the order is another than in memory, unless one block holds all rows.

    Args:
        features: (N, D) or (N, V, D).
        seed: Decides order and views.
        device: Where the batches are to be.
        dtype: What they are to be.
    """

    def __init__(
        self, features: Tensor | StoredFeatures, seed: int, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self._features, self._device, self._dtype = features, device, dtype
        self._order = torch.Generator().manual_seed(seed)
        self._views = torch.Generator().manual_seed(seed ^ _VIEWS_SEED)
        self._chunks = torch.Generator().manual_seed(seed ^ _CHUNKS_SEED)

    def epoch(self, batch_size: int) -> Iterator[Drawn]:
        """Yield the batches of the next epoch, some at once, to be read to the end.

        The features stay until those after the next are drawn: their memory is used again. One row
        that would be left is not drawn: batch norm cannot train on one (pytorch#4534).
        """
        if isinstance(self._features, Tensor):
            return self._gather(self._features, batch_size)
        return self._cut(self._blocks(self._features), batch_size)

    def _gather(self, features: Tensor, batch_size: int) -> Iterator[Drawn]:
        order, views = self._draw(len(features))
        order = _without_last_alone(order, batch_size)
        places = order if views is None else order * features.shape[1] + views[: len(order)]
        size = min(rows_at_once(batch_size), len(order))
        # New memory each time would be asked of the system, and given back.
        memory = [features.new_empty(size, features.shape[-1]) for _ in range(2)]
        flat = features.flatten(0, -2)
        parts = [torch.split(numbers.to(self._device), size) for numbers in (order, places)]
        for number, (rows, of_rows) in enumerate(zip(*parts, strict=True)):
            # index_select takes half the time of flat[of_rows]
            yield rows, torch.index_select(flat, 0, of_rows, out=memory[number % 2][: len(rows)])

    def _draw(self, num_rows: int) -> tuple[Tensor, Tensor | None]:
        """Return an order of rows, and the view of each in that order where there are any."""
        order, views = torch.randperm(num_rows, generator=self._order), None
        if self._features.ndim == 3:
            num_views = self._features.shape[1]
            views = torch.randint(num_views, (num_rows,), generator=self._views)
        return order, views

    def _blocks(self, features: StoredFeatures) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the numbers of the rows of a block, the rows, and the order to take them in.

        The next block is read into the memory of the last.
        """
        chunks = features.chunks()
        num_blocks = math.ceil(len(features) / features.block_rows)
        # Of each stretch of the file every block gets a chunk: its share of each class. Of chunks
        # drawn at random, 64 a block, the classes varied so much that the loss was 0.003 higher.
        shape = math.ceil(len(chunks) / num_blocks), num_blocks
        block_of = torch.rand(shape, generator=self._chunks).argsort(1).flatten()[: len(chunks)]
        blocks = [
            np.concatenate([chunks[i] for i in np.flatnonzero(block_of.numpy() == number)])
            for number in np.unique(block_of.numpy())
        ]
        memory = np.empty((max(map(len, blocks)), features.shape[-1]), features.dtype)
        for place, numbers in enumerate(blocks):
            order, drawn_views = self._draw(len(numbers))
            views = None
            if drawn_views is not None:
                views = np.empty(len(numbers), np.int64)
                views[order.numpy()] = drawn_views.numpy()
            array = memory[: len(numbers)]
            features.read_into(array, numbers, views)
            for following in blocks[place + 1 : place + 2]:
                features.expect(following)
            block = torch.from_numpy(array).to(self._device)
            yield torch.from_numpy(numbers).to(self._device), block, order.to(self._device)

    def _cut(
        self, blocks: Iterator[tuple[Tensor, Tensor, Tensor]], batch_size: int
    ) -> Iterator[Drawn]:
        """Cut blocks into batches; what is left of one goes into the first batches of the next."""
        parts = list[Drawn]()
        size = missing = rows_at_once(batch_size)
        for numbers, block, order in blocks:
            for picked in (order[:missing], *torch.split(order[missing:], size)):
                # Features are copied here: the block's memory is used again.
                if len(picked):
                    parts.append((numbers[picked], block[picked].to(self._dtype)))
                missing -= len(picked)
                if not missing:
                    yield _join(parts)
                    parts, missing = [], size
        if parts:
            rows, features = (_without_last_alone(part, batch_size) for part in _join(parts))
            if len(rows):
                yield rows, features


def rows_at_once(batch_size: int) -> int:
    """Return how many rows are drawn at once."""
    return max(1, _ROWS_AT_ONCE // batch_size) * batch_size


def _without_last_alone(rows: Tensor, batch_size: int) -> Tensor:
    return rows[:-1] if len(rows) % batch_size == 1 else rows


def _join(parts: list[Drawn]) -> Drawn:
    if len(parts) == 1:
        return parts[0]
    rows, features = zip(*parts, strict=True)
    return torch.cat(rows), torch.cat(features)
