"""Which rows a head was trained on, and by which its epoch was chosen: ``RUN/rows.bin``.

With it ``evaluate`` recognises those rows in any cache. README.md of this folder has the format.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.cache.cache_split import CacheSplit
from featcache.errors import RunError
from featcache.files import read_regular
from featcache.heads.rows import Part, RowNumbers
from featcache.heads.streaming import StoredFeatures
from featcache.untrusted import reading_hint

ROWS_NAME = "rows.bin"

_MAGIC, _VERSION = b"featrows", 1
_HEADER = struct.Struct("<8sQQQ32s")  # magic, version, both numbers of rows, sha256 of the weights
# Half a sha256: of 10^9 rows, two have one by chance with a probability of 1e-21.
_KEY_BYTES = 16
_KEYS = np.dtype([(name, f"S{_KEY_BYTES}") for name in ("image", "features", "path")])
_SHA256_BYTES = 32
_MAX_BYTES = 2**31
_BLOCK_ROWS = 1024

_Keys: TypeAlias = npt.NDArray[Any]
_Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SeenRows:
    """Of n rows, those that a head has seen; no row is in two of these.

    Attributes:
        trained: (n,) whether the head was trained on the row.
        validated: (n,) whether the head's epoch was chosen by it.
        unclear: (n,) whether it has the path of a row of either kind, but other features, where no
            image hash tells whether the images are the same.
    """

    trained: _Mask
    validated: _Mask
    unclear: _Mask

    @property
    def any(self) -> _Mask:
        """(n,) whether the row is one of the three."""
        return self.trained | self.validated | self.unclear

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many rows each of the three has."""
        return int(self.trained.sum()), int(self.validated.sum()), int(self.unclear.sum())


@dataclass(frozen=True)
class TrainedRows:
    """Keys of the rows that a head was trained on and chosen by.

    A row's keys are the first 16 bytes of three hashes: of its image file (zeros where unknown), of
    its plain features, and of its path.

    Attributes:
        train: Keys of the rows trained on, ascending.
        valid: Keys of the rows that the epoch was chosen by, ascending.
    """

    train: _Keys
    valid: _Keys

    @classmethod
    def of(cls, parts: Sequence[Part]) -> TrainedRows:
        """Return the keys of the rows to train on and of those to choose by.

        Args:
            parts: Those named ``train`` and those named ``valid``.

        Raises:
            CacheError: If a feature is not finite, or the file was cut short.
        """
        keys = {name: [np.empty(0, _KEYS)] for name in ("train", "valid")}
        for part in parts:
            keys[part.name].append(_row_keys(part.split, part.rows))
        train, valid = (np.sort(np.concatenate(found)) for found in keys.values())
        return cls(train, valid)

    def find(self, split: CacheSplit, rows: RowNumbers) -> SeenRows:
        """Return which of some rows are among these: by their image, else by their features.

        Raises:
            CacheError: As ``of``.
        """
        keys = _row_keys(split, rows)
        (trained, by_train), (validated, by_valid) = (
            _match(keys, known) for known in (self.train, self.valid)
        )
        validated &= ~trained
        return SeenRows(trained, validated, (by_train | by_valid) & ~trained & ~validated)

    def as_bytes(self, weights_sha256: str) -> bytes:
        """Return the content of ``rows.bin`` of the run that has these weights."""
        counts = len(self.train), len(self.valid)
        header = _HEADER.pack(_MAGIC, _VERSION, *counts, bytes.fromhex(weights_sha256))
        data = header + self.train.tobytes() + self.valid.tobytes()
        return data + hashlib.sha256(data).digest()

    @classmethod
    def read(cls, run: Path, weights_sha256: str) -> TrainedRows | None:
        """Return the rows of a run folder, None if it has no ``rows.bin``.

        Raises:
            RunError: If the file is damaged, of another run or of a newer version.
        """
        try:
            data = read_regular(run / ROWS_NAME, max_bytes=_MAX_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(
                f"run, {ROWS_NAME}", expected="a readable file", found=error.strerror, where=run,
                hint=reading_hint(error, "Copy the run again, or train it again"),
            ) from error  # fmt: skip
        if len(data) < _HEADER.size + _SHA256_BYTES or data[: len(_MAGIC)] != _MAGIC:
            raise _damaged(run, "the hashes of the rows trained on", "another file")
        _, version, num_train, num_valid, weights = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise RunError(
                f"run, {ROWS_NAME}", expected=f"version {_VERSION}", found=f"version {version}",
                where=run, hint="A newer featcache wrote it: upgrade with pip install -U featcache",
            )  # fmt: skip
        body, digest = data[:-_SHA256_BYTES], data[-_SHA256_BYTES:]
        if len(body) != _HEADER.size + (num_train + num_valid) * _KEYS.itemsize:
            raise _damaged(run, f"{num_train + num_valid:,} rows", f"{len(data):,} bytes")
        if hashlib.sha256(body).digest() != digest:
            raise _damaged(run, "its own sha256", "another")
        if weights.hex() != weights_sha256:
            raise _damaged(run, f"the rows of {weights_sha256[:16]}...", f"of {weights.hex()[:16]}")
        keys = np.frombuffer(body, _KEYS, offset=_HEADER.size)
        return cls(keys[:num_train], keys[num_train:])


def _row_keys(split: CacheSplit, rows: RowNumbers) -> _Keys:
    """Return the keys (n,) of rows, in their order."""
    keys = np.zeros(len(rows), _KEYS)
    images = np.ascontiguousarray(split.image_sha256[rows, :_KEY_BYTES])
    keys["image"] = images.view(_KEYS["image"])[:, 0]
    paths = split.paths
    keys["path"] = [_key(paths[row].encode("utf-8", "surrogateescape")) for row in rows.tolist()]
    features = StoredFeatures(split, rows, plain=True)
    for i in range(0, len(rows), _BLOCK_ROWS):
        block = features[i : i + _BLOCK_ROWS].load().astype("<f4")
        keys["features"][i : i + len(block)] = [_key(row.tobytes()) for row in block]
    return keys


def _key(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_KEY_BYTES]


def _match(keys: _Keys, known: _Keys) -> tuple[_Mask, _Mask]:
    """Return which rows are among the known ones; and which have the path of one.

    Of the latter, those where one of the two has no hash of its image.
    """
    has_image = keys["image"] != b""
    is_known = has_image & np.isin(keys["image"], known["image"])
    is_known |= np.isin(keys["features"], known["features"])
    without_image = known["path"][known["image"] == b""]
    has_path = np.where(
        has_image, np.isin(keys["path"], without_image), np.isin(keys["path"], known["path"])
    )
    return is_known, has_path & ~is_known


def _damaged(run: Path, expected: str, found: object) -> RunError:
    hint = "The run is damaged or was edited: copy it again, or train it again"
    return RunError(f"run, {ROWS_NAME}", expected=expected, found=found, where=run, hint=hint)
