"""Features that stay in their file: for caches larger than memory.

Rows lie in the order of their paths, and that is by class, so an epoch cannot read a file from
front to back. It reads chunks of rows that lie side by side: random ones of all stretches of the
file make up a block, which has the classes of the whole, and the rows of a block are shuffled.
Chunks of 256 KiB are read as fast as the whole file in one piece (0.8 GB/s from the disk, 9 GB/s
from the system's memory, from where single rows of 5 KiB come at 2 GB/s).

Reads: caches. Writes: nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache_split import CacheSplit
from featcache.errors import CacheError

BLOCK_BYTES = 128 << 20
"""What a block takes where there is memory: 512 chunks."""

_CHUNK_BYTES = 256 << 10
_CHUNKS_PER_BLOCK = 64  # or more: a block then has its share of each class to 1 of 64
_LOAD_BYTES = 8 << 20

_Numbers = npt.NDArray[np.int64]


class StoredFeatures:
    """Features (N, D) or (N, V, D) of rows of a cache, read when they are asked for.

    Shape, length and the selection of rows are as of an array.

    Args:
        split: Where the rows are.
        rows: (N,) their numbers there, ascending.
        plain: Take only view 0 of every row: the features are (N, D).
    """

    def __init__(self, split: CacheSplit, rows: _Numbers, *, plain: bool = False) -> None:
        self._splits, self._readers = [split], [split.open_features()]
        self._sources, self._rows = np.zeros_like(rows), rows
        self._views = [1 if plain else split.num_views]
        self._plain, self._block_bytes = plain, BLOCK_BYTES

    @classmethod
    def join(cls, parts: Sequence[StoredFeatures]) -> StoredFeatures:
        """Return the rows of several as one, in blocks as of the first.

        Where one has fewer views, they come again.
        """
        joined = copy.copy(parts[0])
        joined._splits = [split for part in parts for split in part._splits]
        joined._readers = [reader for part in parts for reader in part._readers]
        joined._views = [number for part in parts for number in part._views]
        starts = np.cumsum([0, *(len(part._splits) for part in parts[:-1])])
        sources = [part._sources + start for part, start in zip(parts, starts, strict=True)]
        joined._sources = np.concatenate(sources)
        joined._rows = np.concatenate([part._rows for part in parts])
        return joined

    def plain(self) -> StoredFeatures:
        """Return the same rows as (N, D), view 0 of each."""
        same = copy.copy(self)
        same._plain, same._views = True, [1] * len(self._views)
        return same

    def in_blocks(self, block_bytes: int) -> StoredFeatures:
        """Return the same rows in blocks that take so much, one view of each row."""
        same = copy.copy(self)
        same._block_bytes = block_bytes
        return same

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D) or (N, V, D)."""
        first = self._readers[0].shape
        views = () if self._plain or len(first) == 2 else (max(self._views),)
        return len(self), *views, first[-1]

    @property
    def ndim(self) -> int:
        """2 or 3."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float16."""
        return np.result_type(*(reader.dtype for reader in self._readers))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | _Numbers) -> StoredFeatures:
        """Return some of the rows, in the same order."""
        some = copy.copy(self)
        some._sources, some._rows = self._sources[index], self._rows[index]
        return some

    def path(self, number: int) -> str:
        """Return the path of the image that a row is of."""
        path: str = self._splits[self._sources[number]].paths[self._rows[number]]
        return path

    @property
    def num_bytes(self) -> int:
        """What ``load`` gives."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def block_rows(self) -> int:
        """How many rows make up a block, or a few more: chunks are not torn."""
        return max(2, self._block_bytes // (self.shape[-1] * self.dtype.itemsize))

    @property
    def _chunk_bytes(self) -> int:
        return min(_CHUNK_BYTES, self._block_bytes // _CHUNKS_PER_BLOCK)

    def load(self) -> npt.NDArray[Any]:
        """Return the features as an array.

        Raises:
            CacheError: If one is not finite, or the file was cut short.
        """
        array: npt.NDArray[Any] = np.empty(self.shape, self.dtype)
        self._fill(array, np.arange(len(self)), None, _LOAD_BYTES)
        return array

    def chunks(self) -> list[_Numbers]:
        """Return the numbers of all rows, in chunks that lie side by side in the file."""
        numbers = np.arange(len(self))
        return [numbers[part] for part, _, _ in self._spans(numbers, self._chunk_bytes)]

    def expect(self, numbers: _Numbers) -> None:
        """Let the system fetch rows from the disk while others are worked on.

        Of 0.8 GB read from the disk while others were worked on, 0.3 s were waited for after the
        first block in place of 0.6 s; a thread of our own would take the memory of a second block.
        """
        for _, source, rows in self._spans(numbers, self._chunk_bytes):
            self._readers[source].expect(int(rows[0]), int(rows[-1] - rows[0]) + 1)

    def read_into(
        self, array: npt.NDArray[Any], numbers: _Numbers, views: _Numbers | None = None
    ) -> None:
        """Read rows into an array (n, D).

        Args:
            array: Of ``dtype``.
            numbers: (n,) of the rows, ascending.
            views: (n,) of them; None takes the plain one.

        Raises:
            CacheError: As ``load``.
        """
        self._fill(array, numbers, views, self._chunk_bytes)

    def _spans(self, numbers: _Numbers, size: int) -> Iterator[tuple[slice, int, _Numbers]]:
        """Cut numbers where the file, cut every ``size`` bytes, is cut between their rows.

        Yields:
            Which numbers, their split, and the rows there.
        """
        sources, rows = self._sources[numbers], self._rows[numbers]
        each = np.array(
            [
                max(1, size // (reader.dtype.itemsize * math.prod(reader.shape[1:])))
                for reader in self._readers
            ]
        )
        places = rows // each[sources]
        edges = np.flatnonzero((np.diff(places) != 0) | (np.diff(sources) != 0)) + 1
        for start, stop in pairwise([0, *edges.tolist(), len(numbers)]):
            if start < stop:
                yield slice(start, stop), int(sources[start]), rows[start:stop]

    def _fill(
        self, array: npt.NDArray[Any], numbers: _Numbers, views: _Numbers | None, size: int
    ) -> None:
        """Read rows into an array, (n, D) of one view each or (n, V, D) of all."""
        for part, source, rows in self._spans(numbers, size):
            reader, num_views, out = self._readers[source], self._views[source], array[part]
            first, num_rows = int(rows[0]), int(rows[-1] - rows[0]) + 1
            as_stored = out.shape[1:] == reader.shape[1:] and out.dtype == reader.dtype
            if num_rows == len(rows) and as_stored:
                reader.read_into(out, first)
            else:
                stored = np.empty((num_rows, *reader.shape[1:]), reader.dtype)
                reader.read_into(stored, first)
                stored = stored.reshape(num_rows, -1, self.shape[-1])
                if out.ndim == 3:
                    out[:] = stored[(rows - first)[:, None], np.arange(out.shape[1]) % num_views]
                else:
                    out[:] = stored[rows - first, 0 if views is None else views[part] % num_views]
            if not np.isfinite(out).all():
                bad = ~np.isfinite(out.reshape(len(out), -1)).all(axis=1)
                raise self._not_finite(source, int(rows[bad.argmax()]))

    def _not_finite(self, source: int, row: int) -> CacheError:
        split = self._splits[source]
        return CacheError(
            f"features of split {split.name}", expected="finite numbers",
            found=f"NaN or infinity in row {row}, {split.paths[row]}",
            where=self._readers[source].path,
            hint="Extract the images again, at --precision fp32",
        )  # fmt: skip
