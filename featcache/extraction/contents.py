"""The contents of images, by number and by sha256: 60 bytes each. A list and a dict took 170.

They are found by a table of their numbers, in slots that the sha256 itself tells, being as good as
random.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.extraction.shards import Vectors

CLAIMED, IN_HAND, FAILED, FORGOTTEN = -1, -2, -3, -4
"""Of a content, in place of the number of the vectors that it is among."""

_SIZE = 32  # bytes of a sha256
_UNKNOWN = bytes(_SIZE)
_EMPTY = -1


class Contents:
    """Contents of images, and where their features are.

    Attributes:
        num_views: Of each, how many vectors it has.
        source: Of each, the number of its ``vectors``, or one of the constants above.
        start: Of each, where its own begin there.
        truncated: Of each, whether its images were cut off and have been filled in.
        vectors: Where features are.
    """

    def __init__(self) -> None:
        self.num_views = array("H")
        self.source = array("i")
        self.start = array("q")
        self.truncated = bytearray()
        self.vectors: list[Vectors] = []
        self._sha256 = bytearray()
        self._slots = array("i", [_EMPTY]) * 1024  # slot -> number; half of them empty

    def __len__(self) -> int:
        return len(self.source)

    def find(self, sha256: bytes, num_views: int = 1) -> int | None:
        """Return the number of a content of at least so many views; None if there is none.

        Of several of one sha256 it is the first of those of the most views.
        """
        number = self._slots[self._slot_of(sha256)]
        if number == _EMPTY or self.source[number] == FORGOTTEN:
            return None
        return number if self.num_views[number] >= num_views else None

    def append(
        self, sha256: bytes, num_views: int, source: int, start: int = 0, *, truncated: bool = False
    ) -> int:
        """Add a content; return its number."""
        number = len(self.source)
        self._sha256 += sha256
        self.num_views.append(num_views)
        self.source.append(source)
        self.start.append(start)
        self.truncated.append(truncated)
        if 2 * number >= len(self._slots):
            self._grow()
        self._enter(number)
        return number

    def _grow(self) -> None:
        """Take twice as many slots. All at once: one by one it was a seventh of listing a row."""
        old = np.frombuffer(self._slots, np.int32)
        slots = np.full(2 * len(old), _EMPTY, np.int32)
        numbers = old[old != _EMPTY]
        heads = np.frombuffer(self._sha256, "<u8").reshape(-1, 4)[numbers, 0]
        places = (heads & np.uint64(len(slots) - 1)).astype(np.int64)
        while len(numbers):
            is_free = slots[places] == _EMPTY
            slots[places[is_free]] = numbers[is_free]  # of several, one stays
            is_left = slots[places] != numbers
            numbers, places = numbers[is_left], (places[is_left] + 1) % len(slots)
        self._slots = array("i", slots.tobytes())

    def _enter(self, number: int) -> None:
        sha256 = self.sha256(number)
        if sha256 == _UNKNOWN:
            return
        slot = self._slot_of(sha256)
        known, views = self._slots[slot], self.num_views
        if known == _EMPTY or self.source[known] == FORGOTTEN or views[known] < views[number]:
            self._slots[slot] = number

    def _slot_of(self, sha256: bytes) -> int:
        """Return the slot of a sha256, which is empty if no content of it was entered."""
        slots, every = self._slots, self._sha256
        last = len(slots) - 1  # a power of two less one
        slot = int.from_bytes(sha256[:8], "little") & last
        while (n := slots[slot]) != _EMPTY and every[_SIZE * n : _SIZE * (n + 1)] != sha256:
            slot = (slot + 1) & last
        return slot

    def sha256(self, number: int) -> bytes:
        """Return the sha256 of a content; zeros where it is not known."""
        return bytes(self._sha256[_SIZE * number : _SIZE * (number + 1)])

    def sha256_of(self, numbers: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """Return the sha256 of some contents, (n, 32) uint8."""
        every = np.frombuffer(self._sha256, np.uint8).reshape(-1, _SIZE)
        return every[numbers]  # a copy: the bytearray cannot grow while something looks at it

    def feature_blocks(
        self, numbers: npt.NDArray[np.int32], num_views: int = 1, block_vectors: int = 4096
    ) -> Iterator[npt.NDArray[Any]]:
        """Gather the features of some contents in their order, a block at a time.

        Of a content of more views than ``num_views``, the first are taken.

        Yields:
            (n, D) if ``num_views`` is 1, else (n, num_views, D).
        """
        block_rows = max(1, block_vectors // num_views)
        for i in range(0, len(numbers), block_rows):
            part = numbers[i : i + block_rows]
            sources = np.frombuffer(self.source, self.source.typecode)[part]
            starts = np.frombuffer(self.start, self.start.typecode)[part]
            block: npt.NDArray[Any] | None = None
            for source in np.unique(sources):
                vectors = self.vectors[source]()
                if block is None:
                    block = np.empty((len(part), num_views, vectors.shape[1]), vectors.dtype)
                where = np.flatnonzero(sources == source)
                numbers_there = starts[where, None] + np.arange(num_views)
                block[where] = vectors.take(numbers_there.reshape(-1)).reshape(
                    -1, num_views, vectors.shape[1]
                )
                del vectors
            assert block is not None
            yield block[:, 0] if num_views == 1 else block


class HashColumn:
    """The sha256 of the contents of some rows, made when they are written: ``writing.Column``."""

    def __init__(self, contents: Contents, numbers: npt.NDArray[np.int32]) -> None:
        self._contents, self._numbers = contents, numbers
        self.shape, self.dtype = (len(numbers), _SIZE), np.dtype(np.uint8)

    def __getitem__(self, rows: slice) -> npt.NDArray[np.uint8]:
        return self._contents.sha256_of(self._numbers[rows])
