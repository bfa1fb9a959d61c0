"""Read rows of an array from an open file: no mapping, so that a file cut off is an error.

Reads: caches and shards.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import CacheError

_PIECE_BYTES = 1 << 22


class RowReader:
    """Reads rows of one array from an open file; threads may share it.

    The file stays open, so the old file is read on even if it is replaced. On Windows it is opened
    for each read, as nobody could replace or remove it while it is open. Nothing is mapped into
    memory: ``ulimit -v`` may be smaller than the array, and a file that is cut off meanwhile is an
    error and not the end of the process (SIGBUS).

    Args:
        open_file: Opens the file, always the same one, or raises an error.
        offset: Where the array begins in it, in bytes.
        shape: Of the array, its rows first.
        dtype: Of the array.
        failed: Makes the error to raise where the disk fails, or, of None, where the file has
            become shorter.
    """

    def __init__(
        self, open_file: Callable[[], io.FileIO], offset: int, shape: tuple[int, ...],
        dtype: np.dtype[Any], failed: Callable[[OSError | None], CacheError],
    ) -> None:  # fmt: skip
        self.shape, self.dtype = shape, dtype
        self._open, self._offset, self._failed = open_file, offset, failed
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._lock = threading.Lock()
        self._file = open_file()
        weakref.finalize(self, self._file.close)
        if sys.platform == "win32":
            self._file.close()

    def read_into(self, array: npt.NDArray[Any], first: int = 0) -> None:
        """Fill a contiguous array of the right dtype with rows, from row ``first`` on."""
        self._fill(array.reshape(-1).view(np.uint8).data, first * self._row_bytes)

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return some rows by their numbers (n,); neighbours are read together."""
        taken = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if taken.size:
            starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1).tolist()
            for start, end in pairwise([*starts, len(rows)]):
                self.read_into(taken[start:end], int(rows[start]))
        return taken

    def blocks(self, num_rows: int) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        """Yield so many rows at a time, the last fewer: which they are, and the rows."""
        for first in range(0, self.shape[0], num_rows):
            rows = slice(first, min(first + num_rows, self.shape[0]))
            block: npt.NDArray[Any] = np.empty((rows.stop - first, *self.shape[1:]), self.dtype)
            self.read_into(block, first)
            yield rows, block

    def pieces(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the bytes of the array in their order, 4 MiB at a time."""
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        for start in range(0, num_bytes, _PIECE_BYTES):
            piece = np.empty(min(_PIECE_BYTES, num_bytes - start), np.uint8)
            self._fill(piece.data, start)
            yield piece

    def _fill(self, target: memoryview, start: int) -> None:
        """Fill ``target`` with the array's bytes from ``start`` on."""
        with self._lock, self._opened() as file:
            file.seek(self._offset + start)
            while target:
                try:
                    count = file.readinto(target)
                except OSError as error:
                    raise self._failed(error) from error
                if not count:
                    raise self._failed(None)
                target = target[count:]

    @contextlib.contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        if not self._file.closed:
            yield self._file
            return
        with self._open() as file:
            yield file

    def expect(self, first: int, num_rows: int) -> None:
        """Ask the system to read rows ahead, where it can."""
        if hasattr(os, "posix_fadvise") and not self._file.closed:
            where = self._offset + first * self._row_bytes, num_rows * self._row_bytes
            with contextlib.suppress(OSError):  # it is advice
                os.posix_fadvise(self._file.fileno(), *where, os.POSIX_FADV_WILLNEED)
