"""Shards: files with rows of a cache in the making.

A shard is the raw features of some images, one vector of each or V of an image to train on, and
behind them a table in JSON: of each image the path, size, time and hash, and how many vectors it
has (0: those of the same content elsewhere). It is written and synced before a manifest lists it.

Reads and writes: ``CACHE.partial/shard.00000`` ...
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.row_reader import RowReader
from featcache.errors import CacheError
from featcache.extraction.manifest import Receipt
from featcache.files import canonical_json, disk_error, sha256_stream, write_bytes
from featcache.untrusted import open_regular, parse_json

Vectors = Callable[[], RowReader]
"""Opens (M, D) features, which are read as they are asked for."""

_MAX_VIEWS = (1 << 16) - 1  # of an image, as the ledger counts them
_NO_FILE = {errno.ENOENT, errno.EISDIR, errno.EINVAL}  # of ``open_regular``: nothing can be lost


def shard_number(file: str) -> int:
    """Return the number in the name of a shard."""
    return int(file.removeprefix("shard."))


def write_shard(
    path: Path, vectors: npt.NDArray[Any], rows: Sequence[Mapping[str, Any]]
) -> Receipt:
    """Write one shard, which counts as soon as the manifest lists it: ``PartialCache.add_shard``.

    Args:
        path: The file, ``shard.`` and a number.
        vectors: (M, D) in the stored dtype.
        rows: Dicts of ``path, image_bytes, mtime_ns, image_sha256 (hex), truncated, views``; their
            vectors follow each other in ``vectors``. Of a row with 0 views there are none.

    Raises:
        CacheError: If the disk is full or the folder cannot be written.
    """
    data = vectors.tobytes() + canonical_json(list(rows)).encode()
    try:
        write_bytes(path, data)
    except OSError as error:
        raise disk_error(error, path, len(data)) from error
    return Receipt(path.name, len(rows), len(vectors), hashlib.sha256(data).hexdigest())


def read_table(
    path: Path, receipt: Receipt, num_features: int, dtype: np.dtype[Any]
) -> list[dict[str, Any]]:
    """Return the rows of a shard.

    Raises:
        ValueError: If they are not such as were written.
        OSError: If it cannot be read.
    """
    num_bytes = receipt.num_vectors * num_features * dtype.itemsize
    with open_regular(path) as file:
        if num_bytes > os.fstat(file.fileno()).st_size:
            raise ValueError("fewer vectors")
        file.seek(num_bytes)
        rows = parse_json(file.read())
    if not isinstance(rows, list) or len(rows) != receipt.num_rows:
        raise ValueError("another number of rows")
    for row in rows:
        _check_row(row)
    if sum(row["views"] for row in rows) != receipt.num_vectors:
        raise ValueError("another number of vectors")
    return rows


def open_vectors(
    path: Path, num_vectors: int, num_features: int, dtype: np.dtype[Any]
) -> RowReader:
    """Open the vectors of a shard, which are read as they are asked for."""

    def failed(error: OSError | None) -> CacheError:
        if error is not None and error.errno not in _NO_FILE:
            return unreadable_shard(path, error)
        return CacheError(
            "shard", expected="the file that was written", where=path,
            found="a shorter one" if error is None else error.strerror,
            hint="Run the same command again: it makes that shard again",
        )  # fmt: skip

    def open_shard() -> io.FileIO:
        try:
            return open_regular(path)
        except OSError as error:
            raise failed(error) from error

    return RowReader(open_shard, 0, (num_vectors, num_features), dtype, failed)


def is_whole(folder: Path, receipt: Receipt) -> bool:
    """Return whether a shard is there as it was written.

    Raises:
        CacheError: If it cannot be read, so that nobody knows.
    """
    path = folder / receipt.file
    try:
        with open_regular(path) as file:
            return sha256_stream(file) == receipt.sha256
    except OSError as error:
        if error.errno in _NO_FILE:
            return False
        raise unreadable_shard(path, error) from error


def unreadable_shard(path: Path, error: OSError) -> CacheError:
    """Return the error of a shard that cannot be read: that may pass."""
    return CacheError(
        "shard", expected="a file that can be read", found=error.strerror or error, where=path,
        hint="Run the same command again. If that does not help, remove this file and repeat the "
        "extract command: it makes that shard again",
    )  # fmt: skip


def _check_row(row: Any) -> None:
    """Refuse a row of a shard's table that ``Ledger.describe_row`` did not make."""
    kinds = {"path": str, "image_bytes": int, "mtime_ns": int, "image_sha256": str, "views": int}
    fits = isinstance(row, dict) and all(type(row.get(k)) is kind for k, kind in kinds.items())
    if not (
        fits
        and re.fullmatch("[0-9a-f]{64}", row["image_sha256"])
        and type(row.get("truncated")) is bool
        and 0 <= row["views"] <= _MAX_VIEWS
    ):
        raise ValueError(f"a row of {row!r:.80}")
