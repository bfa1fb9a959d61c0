"""Training and validation arrays, and the shuffled mini-batches of an epoch.

Batches are drawn a few at a time: each row in a new order and, of rows with views, one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError
from featcache.heads.head import HeadConfig
from featcache.heads.scaling import ColumnScaling
from featcache.heads.streaming import StoredFeatures

Array = npt.NDArray[Any]
Features: TypeAlias = Array | StoredFeatures

Batches: TypeAlias = tuple[Array, Any]
"""Numbers of rows (n,) and their features (n, D): some batches, one after the other."""

_ROWS_AT_ONCE = 256
"""Rows that are drawn at once, if a batch is smaller: eight batches of 32."""

_VALID_ROWS = 4096  # that are standardised at once

_VIEWS_STREAM, _BLOCKS_STREAM = 1, 2  # of numbers, beside that of the order


@dataclass(frozen=True)
class TrainingData:
    """Training and validation arrays shared by all heads.

    Attributes:
        features: (N, D) or (N, V, D) of ``dtype``, or still in their file.
        targets: (N,) int64, or (N, C) float of 0, 1 and NaN = unknown: several labels a row.
        row_weights: (N,) of ``dtype``, or None.
        valid_features: (M, D), or None: there are no validation rows.
        valid_targets: (M,) or (M, C), or None.
        names: Of the classes, for the history's columns.
        data_seed: Of the order and the views.
        dtype: What is computed in, float32 or float64.
        scaling: Applied to features as they are taken, or None.
    """

    features: Features
    targets: Array
    row_weights: Array | None
    valid_features: Features | None
    valid_targets: Array | None
    names: Sequence[str]
    data_seed: int
    dtype: np.dtype[Any]
    scaling: ColumnScaling | None = None

    @classmethod
    def of(  # noqa: PLR0917
        cls, features: Features, targets: Array, valid_features: Features | None,
        valid_targets: Array | None, row_weights: Array | None, names: Sequence[str],
        data_seed: int,
    ) -> TrainingData:  # fmt: skip
        """Convert arrays to what is computed in: float64 if the features are, else float32."""
        dtype = np.dtype(np.float64 if features.dtype == np.float64 else np.float32)
        return cls(
            _convert(features, dtype),
            targets.astype(np.int64) if targets.ndim == 1 else targets.astype(dtype),
            None if row_weights is None else row_weights.astype(dtype),
            None if valid_features is None else _convert(valid_features, dtype), valid_targets,
            names, data_seed, dtype,
        )  # fmt: skip

    @property
    def num_valid(self) -> int:
        """M, 0 without validation rows."""
        return 0 if self.valid_targets is None else len(self.valid_targets)

    def valid_blocks(self) -> Iterator[Array]:
        """Yield the validation features, some rows at a time where not all are there as wanted."""
        features, scaling = self.valid_features, self.scaling
        if features is None:
            return
        size = len(features)
        if isinstance(features, StoredFeatures):
            size = features.block_rows
        elif scaling is not None:
            size = _VALID_ROWS
        for i in range(0, len(features), size):
            block = features[i : i + size]
            rows = block.load() if isinstance(block, StoredFeatures) else block
            yield rows if scaling is None else scaling.apply(rows)


def _convert(features: Features, dtype: np.dtype[Any]) -> Features:
    return features if isinstance(features, StoredFeatures) else np.asarray(features, dtype)


class TorchOrder:
    """Orders of rows: those of ``torch.randperm`` under a torch generator on the CPU.

    Args:
        seed: Of the generator; as in torch, only its lower 32 bits count.

    Attributes:
        generator: What the orders are drawn by.
    """

    def __init__(self, seed: int) -> None:
        self.generator = np.random.RandomState(seed & 0xFFFFFFFF)

    def permutation(self, num_rows: int, shuffle: Callable[[Array, Array], None]) -> Array:
        """Return the next order (N,).

        Args:
            num_rows: N, below 2**32 / 20, from where torch has another method.
            shuffle: That of ``compiled.numpy_kernels``, or the compiled one.
        """
        order, starts = np.arange(num_rows), np.arange(max(num_rows - 1, 0))
        draws = self.generator.randint(0, 1 << 32, len(starts), dtype=np.uint32)
        shuffle(order, starts + draws % (num_rows - starts))
        return order


class BatchSampler:
    """Shuffled mini-batches of an epoch, several per draw; one view drawn per row.

    Features in their file are read in shuffled blocks: the order is then another than in memory,
    unless one block holds all rows.

    Args:
        data: The rows.
        shuffle: See ``TorchOrder.permutation``.
        gather: Returns rows (n, D) of all the views' features (N * V, D) in memory, scaled; by
            default NumPy does, into memory that is used again for the next.
    """

    def __init__(
        self, data: TrainingData, shuffle: Callable[[Array, Array], None],
        gather: Callable[[Array], Any] | None = None,
    ) -> None:  # fmt: skip
        self._features, self._dtype, self._shuffle = data.features, data.dtype, shuffle
        self._scaling = data.scaling
        self._gather = gather or self._gather_array
        self._order = TorchOrder(data.data_seed)
        self._views = np.random.default_rng([data.data_seed, _VIEWS_STREAM])
        self._blocks_order = np.random.default_rng([data.data_seed, _BLOCKS_STREAM])
        self._memory = np.empty((0, 0))

    @property
    def generators(self) -> list[np.random.Generator | np.random.RandomState]:
        """What the following epochs are drawn by."""
        return [self._order.generator, self._views, self._blocks_order]

    def epoch(self, batch_size: int) -> Iterator[Batches]:
        """Yield the batches of the next epoch, some at once, to be read to the end.

        One row that would be left is not drawn: batch norm cannot train on one (pytorch#4534).
        """
        if isinstance(self._features, StoredFeatures):
            yield from self._cut(self._read_blocks(self._features), batch_size)
            return
        order, views = self._draw(len(self._features))
        order = _without_single_last(order, batch_size)
        places = order if views is None else order * self._features.shape[1] + views[: len(order)]
        size = rows_at_once(batch_size)
        for start in range(0, len(order), size):
            part = slice(start, start + size)
            yield order[part], self._gather(places[part])

    def _gather_array(self, places: Array) -> Array:
        features = self._features
        assert not isinstance(features, StoredFeatures)
        if len(self._memory) < len(places):
            self._memory = np.empty((len(places), features.shape[-1]), self._dtype)
        flat = features.reshape(-1, features.shape[-1])
        # "clip" writes straight into the memory, in a third of the time of "raise".
        rows = np.take(flat, places, 0, out=self._memory[: len(places)], mode="clip")
        return self._scale(rows)

    def _scale(self, rows: Array) -> Array:
        if self._scaling is not None:
            rows -= self._scaling.mean
            rows *= self._scaling.inverse
        return rows

    def _draw(self, num_rows: int) -> tuple[Array, Array | None]:
        """Return an order of rows, and the view of each in that order where there are any."""
        order, views = self._order.permutation(num_rows, self._shuffle), None
        if self._features.ndim == 3:
            views = self._views.integers(self._features.shape[1], size=num_rows)
        return order, views

    def _read_blocks(self, features: StoredFeatures) -> Iterator[tuple[Array, Array, Array]]:
        """Yield the numbers of the rows of a block, the rows, and the order to take them in.

        The next block is read into the memory of the last.
        """
        chunks = features.chunks()
        num_blocks = math.ceil(len(features) / features.block_rows)
        # Of each stretch of the file every block gets a chunk: its share of each class. Of chunks
        # drawn at random, 64 a block, the classes varied so much that the loss was 0.003 higher.
        shape = math.ceil(len(chunks) / num_blocks), num_blocks
        block_of = self._blocks_order.random(shape).argsort(1).reshape(-1)[: len(chunks)]
        blocks = [
            np.concatenate([chunks[i] for i in np.flatnonzero(block_of == number)])
            for number in np.unique(block_of)
        ]
        memory = np.empty((max(map(len, blocks)), features.shape[-1]), features.dtype)
        for place, numbers in enumerate(blocks):
            order, drawn_views = self._draw(len(numbers))
            views = None
            if drawn_views is not None:
                views = np.empty(len(numbers), np.int64)
                views[order] = drawn_views
            block = memory[: len(numbers)]
            features.read_into(block, numbers, views)
            for following in blocks[place + 1 : place + 2]:
                features.expect(following)
            yield numbers, block, order

    def _cut(
        self, blocks: Iterator[tuple[Array, Array, Array]], batch_size: int
    ) -> Iterator[Batches]:
        """Cut blocks into batches; what is left of one goes into the first batches of the next."""
        parts = list[tuple[Array, Array]]()
        size = missing = rows_at_once(batch_size)
        for numbers, block, order in blocks:
            for start in range(missing - size, len(order), size):
                picked = order[max(start, 0) : start + size]
                # Features are copied here: the block's memory is used again.
                rows = self._scale(block[picked].astype(self._dtype, copy=False))
                parts.append((numbers[picked], rows))
                missing -= len(picked)
                if not missing:
                    yield _join(parts)
                    parts, missing = [], size
        if parts:
            rows, features = (_without_single_last(part, batch_size) for part in _join(parts))
            if len(rows):
                yield rows, features


def rows_at_once(batch_size: int) -> int:
    """Return how many rows are drawn at once."""
    return max(1, _ROWS_AT_ONCE // batch_size) * batch_size


def _without_single_last(rows: Array, batch_size: int) -> Array:
    return rows[:-1] if len(rows) % batch_size == 1 else rows


def _join(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    if len(parts) == 1:
        return parts[0]
    rows, features = zip(*parts, strict=True)
    return np.concatenate(rows), np.concatenate(features)


def check_rows(
    what: str,
    features: Features,
    targets: Array,
    head: HeadConfig,
    *,
    rank: int,
    at_least: int,
    views: bool = False,
) -> None:
    """Check that features and targets fit each other and the head.

    Args:
        what: Names the rows in the error.
        features: (N, D), or (N, V, D) with ``views``.
        targets: (N,) integers or (N, C) floats.
        head: Whose D and C they must have.
        rank: Of the targets.
        at_least: Rows.
        views: Whether the features have views.

    Raises:
        DataError: If they do not.
    """
    found, top = f"features {features.shape}, targets {targets.shape}", head.num_classes - 1
    shape = (*features.shape[:1], *features.shape[2:]) if views else features.shape
    has_labels = rank == 2
    targets_shape = (len(targets), head.num_classes) if has_labels else (len(targets),)
    if (
        (shape, targets.shape) != ((len(targets), head.num_features), targets_shape)
        or targets.dtype.kind not in ("f" if has_labels else "iu")
    ):  # fmt: skip
        kind = f"(N, V, {head.num_features})" if views else f"(N, {head.num_features})"
        kinds = f"(N, {head.num_classes}) of floats" if has_labels else "(N,) of whole numbers"
        wanted = f"features {kind} and targets {kinds}"
        raise DataError(what, expected=wanted, found=found)
    if 0 in features.shape[1:]:
        raise DataError(what, expected="at least one view", found=found)
    if len(targets) < at_least:
        raise DataError(what, expected=f"at least {at_least}", found=len(targets))
    if has_labels:
        known = ~np.isnan(targets)
        if not np.isin(targets[known], (0, 1)).all() or not known.any(axis=1).all():
            found = "a row without a known one" if not known.any(axis=1).all() else "other numbers"
            raise DataError(what, expected="targets of 0, 1 and NaN, some known", found=found)
    elif targets.min() < 0 or targets.max() > top:
        found = f"{targets.min()} to {targets.max()}"
        raise DataError(what, expected=f"targets from 0 to {top}", found=found)


def check_row_weights(weights: Array, num_rows: int) -> None:
    """Check the weights of training rows.

    Raises:
        DataError: If they are not (N,) finite numbers above 0.
    """
    if weights.shape != (num_rows,) or not (np.isfinite(weights) & (weights > 0)).all():
        found = f"{weights.shape}, {weights.min(initial=np.inf)} to {weights.max(initial=-np.inf)}"
        wanted = f"({num_rows},) finite numbers above 0"
        raise DataError("weights of training rows", expected=wanted, found=found)
