"""Several caches read as one: the rows of the first, the features of all side by side.

Module ``side_by_side`` matches the rows and makes these.

Reads: open caches. Writes: nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache_split import CacheSplit
from featcache.cache.container import ArrayReader
from featcache.cache.reading import Cache
from featcache.files import canonical_json

_Numbers = npt.NDArray[np.int64]


class JoinedReader(ArrayReader):
    """Reads rows (D1 + D2 + ...) of several splits; threads may share it.

    Args:
        splits: Each with its own D.
        rows: Per split, which of its rows stands in each place; None if all stand in their own.
        as_vectors: Read (N, V, D) as (N * V, D).
    """

    def __init__(
        self, splits: Sequence[CacheSplit], rows: Sequence[_Numbers | None], *,
        as_vectors: bool = False,
    ) -> None:  # fmt: skip
        # No file of its own is opened: those of the splits are read.
        self._readers = [split.open_features(as_vectors=as_vectors) for split in splits]
        self._rows, self.path = rows, self._readers[0].path
        self._num_views = splits[0].num_views if as_vectors else 1
        widths = [reader.shape[-1] for reader in self._readers]
        self._edges = np.cumsum([0, *widths]).tolist()
        self.shape = (*self._readers[0].shape[:-1], sum(widths))
        self.dtype = np.result_type(*(reader.dtype for reader in self._readers))

    def read_into(self, array: npt.NDArray[Any], first: int = 0) -> None:
        """Fill a contiguous array of the right dtype with rows, from row ``first`` on."""
        out = array.reshape(-1, *self.shape[1:])
        for i, (reader, rows) in enumerate(zip(self._readers, self._rows, strict=True)):
            if rows is None:
                part = np.empty((len(out), *reader.shape[1:]), reader.dtype)
                reader.read_into(part, first)
            else:
                places, views = np.divmod(np.arange(first, first + len(out)), self._num_views)
                part = reader.take(rows[places] * self._num_views + views)
            out[..., self._edges[i] : self._edges[i + 1]] = part

    def pieces(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the bytes of the array in their order, 1,024 rows at a time."""
        for _, block in self.blocks(1024):
            yield block.reshape(-1).view(np.uint8)

    def expect(self, first: int, num_rows: int) -> None:
        """Ask the system to read rows ahead, where they lie in a file's own order."""
        for reader, rows in zip(self._readers, self._rows, strict=True):
            if rows is None:
                reader.expect(first, num_rows)


class JoinedSplit(CacheSplit):
    """One split of several caches: rows of the first, features of all side by side.

    Args:
        name: Of the split.
        splits: The caches' own, the first of which gives targets, paths and groups.
        rows: See ``JoinedReader``.
    """

    def __init__(
        self, name: str, splits: Sequence[CacheSplit], rows: Sequence[_Numbers | None]
    ) -> None:
        super().__init__(splits[0]._container, name)
        self._splits, self._rows = tuple(splits), tuple(rows)

    def __repr__(self) -> str:
        return f"JoinedSplit({self.name} of {len(self._splits)} caches: {self.dtype} {self.shape})"

    @cached_property
    def features(self) -> npt.NDArray[Any]:
        """(N, D) or (N, V, D), in memory: of several files there is no view."""
        features = self.read_features()
        features.flags.writeable = False
        return features

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D) or (N, V, D), D being the sum over the caches."""
        shapes = [split.shape for split in self._splits]
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 if one of the caches has that, else float16."""
        return np.result_type(*(split.dtype for split in self._splits))

    @cached_property
    def image_sha256(self) -> npt.NDArray[np.uint8]:
        """(N, 32) uint8, zeros where no cache knows it."""
        hashes = self._splits[0].image_sha256.copy()
        for split, rows in zip(self._splits[1:], self._rows[1:], strict=True):
            others = split.image_sha256 if rows is None else split.image_sha256[rows]
            hashes = np.where(hashes.any(axis=1, keepdims=True), hashes, others)
        hashes.flags.writeable = False
        return hashes

    @property
    def row_crc32(self) -> None:
        """None: there are no checksums of joined rows."""
        return

    def read_features(self) -> npt.NDArray[Any]:
        """Return the features as an array in memory."""
        features: npt.NDArray[Any] = np.empty(self.shape, self.dtype)
        self.open_features().read_into(features)
        return features

    def open_features(self, *, as_vectors: bool = False) -> JoinedReader:
        """Return what reads the features row by row."""
        return JoinedReader(self._splits, self._rows, as_vectors=as_vectors)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "splits": self._splits, "rows": self._rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


@dataclass(frozen=True)
class JoinedCache(Cache):
    """Caches side by side, as one: path, provenance and targets are those of the first.

    Its identity lists theirs under ``side_by_side``, and its hashes are of the list of theirs.

    Attributes:
        caches: The caches, in the order of their features.
    """

    caches: tuple[Cache, ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 of the identity."""
        return _hash_of(self.identity)

    @property
    def payload_sha256(self) -> str:
        """sha256 of the list of the caches' own."""
        return _hash_of([cache.payload_sha256 for cache in self.caches])

    @property
    def content_sha256(self) -> str:
        """sha256 of the list of the caches' own."""
        return _hash_of([cache.content_sha256 for cache in self.caches])


def _hash_of(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
