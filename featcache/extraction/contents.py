"""The contents of image files whose features are known, or are being made: found by sha256.

Features depend on nothing but an image's bytes and the recipe, so whatever file holds known
content, under whatever name, needs no forward pass.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = Callable[[], npt.NDArray[Any]]
"""Opens (M, D) features, mapped: their pages leave the memory with the array."""

_SHA256_BYTES = 32
_UNKNOWN = bytes(_SHA256_BYTES)
_FREE = -1
_NOWHERE = -1


class Contents:
    """Entries numbered from 0: of each a sha256, how many vectors it has, and where they are.

    A dict of bytes to tuples would take 350 bytes an entry; these columns, with an open-addressing
    table over them (linear probing, at most half full), take 60. Threads may share one.
    """

    def __init__(self) -> None:
        self._vectors: list[Vectors] = []
        self._sha256 = bytearray()
        self._truncated = bytearray()
        self._num_views = array("H")
        self._source = array("i")
        self._start = array("q")
        self._table = array("i", [_FREE]) * 1024
        self._claims: dict[str, int] = {}  # in the making, by the path of the image
        self._reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def add(
        self, vectors: Vectors, num_views: Sequence[int], sha256: Sequence[bytes],
        truncated: Sequence[bool],
    ) -> range:  # fmt: skip
        """Add contents whose features are there; return their numbers.

        Args:
            vectors: Opens (M, D), ``num_views[i]`` of each content, one after the other.
            num_views: V of each.
            sha256: Of each; 32 zero bytes if it is not known.
            truncated: Whether the image was cut off and has been filled in.
        """
        with self._lock:
            source, start, first = self._add_vectors(vectors), 0, len(self)
            for i, views in enumerate(num_views):
                number = self._append(sha256[i], views)
                self._place(number, source, start, truncated=truncated[i])
                start += views
                if sha256[i] != _UNKNOWN:
                    self._enter(number)
            return range(first, len(self))

    def find(self, sha256: bytes, num_views: int = 1) -> int | None:
        """Return the number of a content of at least ``num_views`` vectors, known or in the making.

        Of more than are wanted, the first are taken (``train`` has become ``valid``).
        """
        with self._lock:
            return self._find(sha256, num_views)

    def claim(self, sha256: bytes, num_views: int, maker: str) -> bool:
        """Return whether ``maker`` is to make the features: nobody has, and nobody else is at it.

        Asked again, the one who is at it hears the same.
        """
        with self._lock:
            if maker not in self._claims and self._find(sha256, num_views) is None:
                number = self._append(sha256, num_views)
                self._enter(number)
                self._claims[maker] = number
            return maker in self._claims

    def claimed_by(self, maker: str) -> int | None:
        """Return the number of the content that ``maker`` is at, or None."""
        return self._claims.get(maker)

    def add_made(self, vectors: Vectors, makers: Sequence[str], truncated: Sequence[bool]) -> None:
        """Note where the vectors of claimed contents are: one after the other in (M, D)."""
        with self._lock:
            source, start = self._add_vectors(vectors), 0
            for maker, cut in zip(makers, truncated, strict=True):
                number = self._claims.pop(maker)
                self._place(number, source, start, truncated=cut)
                start += self._num_views[number]

    def fail(self, maker: str, reason: str) -> None:
        """Note that a claimed content has no features, and why."""
        with self._lock:
            self._reasons[self._claims.pop(maker)] = reason

    def release(self, maker: str) -> None:
        """Forget a claim: whoever comes with the content next makes its features."""
        with self._lock:
            self._num_views[self._claims.pop(maker)] = 0  # found by nobody

    def failure(self, number: int) -> str | None:
        """Return why a content has no features, or None."""
        return self._reasons.get(number)

    def num_views(self, number: int) -> int:
        """Return V, how many vectors a content has."""
        return self._num_views[number]

    def is_made(self, number: int) -> bool:
        """Return whether its vectors are there."""
        return self._source[number] != _NOWHERE

    def is_truncated(self, number: int) -> bool:
        """Return whether the image was cut off and has been filled in."""
        return bool(self._truncated[number])

    def sha256_of(self, number: int) -> bytes:
        """Return a content's sha256, 32 bytes."""
        return bytes(self._bytes_of(number))

    def sha256(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return the sha256 (n, 32) uint8 of some contents."""
        return np.frombuffer(bytes(self._sha256), np.uint8).reshape(-1, _SHA256_BYTES)[numbers]

    def blocks(
        self, numbers: npt.NDArray[np.int64], num_views: int = 1, block_vectors: int = 4096
    ) -> Iterator[npt.NDArray[Any]]:
        """Gather the features of some contents in their order, a block at a time.

        Yields:
            (n, D) if ``num_views`` is 1, else (n, num_views, D).
        """
        all_sources, all_starts = np.array(self._source), np.array(self._start)
        block_rows = max(1, block_vectors // num_views)
        for i in range(0, len(numbers), block_rows):
            part = numbers[i : i + block_rows]
            sources, starts = all_sources[part], all_starts[part]
            block: npt.NDArray[Any] | None = None
            for source in np.unique(sources):
                vectors = self._vectors[source]()
                if block is None:
                    block = np.empty((len(part), num_views, vectors.shape[1]), vectors.dtype)
                where = np.flatnonzero(sources == source)
                block[where] = vectors[starts[where, None] + np.arange(num_views)]
                del vectors
            assert block is not None
            yield block[:, 0] if num_views == 1 else block

    def _add_vectors(self, vectors: Vectors) -> int:
        self._vectors.append(vectors)
        return len(self._vectors) - 1

    def _append(self, sha256: bytes, num_views: int) -> int:
        self._sha256 += sha256
        self._truncated.append(0)
        self._num_views.append(num_views)
        self._source.append(_NOWHERE)
        self._start.append(0)
        return len(self) - 1

    def _place(self, number: int, source: int, start: int, *, truncated: bool) -> None:
        self._source[number], self._start[number] = source, start
        self._truncated[number] = truncated

    def _bytes_of(self, number: int) -> bytearray:
        return self._sha256[number * _SHA256_BYTES : (number + 1) * _SHA256_BYTES]

    def _find(self, sha256: bytes, num_views: int) -> int | None:
        number = self._table[self._slot(sha256)]
        return number if number != _FREE and self._num_views[number] >= num_views else None

    def _slot(self, sha256: bytes | bytearray) -> int:
        """Return where in the table the content is, or would be."""
        last = len(self._table) - 1
        slot = int.from_bytes(sha256[:8], "little") & last
        while (number := self._table[slot]) != _FREE and self._bytes_of(number) != sha256:
            slot = (slot + 1) & last
        return slot

    def _enter(self, number: int) -> None:
        """Let the content be found; of two entries of one content, the newer one of most views."""
        if 2 * len(self) > len(self._table):
            held = [n for n in self._table if n != _FREE]
            self._table = array("i", [_FREE]) * (2 * len(self._table))
            for other in held:
                self._table[self._slot(self._bytes_of(other))] = other
        slot = self._slot(self._bytes_of(number))
        there = self._table[slot]
        if there == _FREE or self._num_views[there] <= self._num_views[number]:
            self._table[slot] = number
