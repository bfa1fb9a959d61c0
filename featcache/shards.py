"""A cache in the making: ``CACHE.partial/{lock, manifest.json, shard.00000, ...}``.

A shard is the raw features of some rows: one vector of each image, or V of an image to train on.
The manifest alone says what is done: each shard's sha256, and of each row the image's path, size,
time and hash, and how many vectors it has. A shard is written and fsynced
before the manifest lists it, so a kill at any instant loses only rows that were not listed yet.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.dataset import Sample
from featcache.errors import CacheError
from featcache.files import atomic_writer, canonical_json, sha256_file, write_bytes
from featcache.hdf5 import disk_error

SHARD_BYTES = 16 << 20
SHARD_ROWS = 8192
"""No shard has more, however narrow the features: rows wait in memory until their shard is full."""
_FORMAT = "featcache-partial"
_FORMAT_VERSION = 1

ImageKey = tuple[str, int, int]
"""Path, size in bytes and modification time in ns: an image believed unchanged."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row whose features are known: where its vectors are, and of which image they are.

    Attributes:
        source: Which array holds them.
        start: The first one's number in it; view 0.
        num_views: How many there are, one after the other.
        sha256: Of the image file.
        truncated: It was cut off and has been filled in.
    """

    source: int
    start: int
    num_views: int
    sha256: bytes
    truncated: bool


@dataclass(frozen=True)
class EngineFacts:
    """What must not change between the shards of one cache."""

    engine: str
    precision: str
    batch_size: int
    num_threads: int
    device_type: str


class KnownRows:
    """Features of images that need no forward pass: from shards, or from an older cache."""

    def __init__(self) -> None:
        self._sources: list[npt.NDArray[Any]] = []
        self._rows: dict[ImageKey, Row] = {}

    def add(
        self, vectors: npt.NDArray[Any], num_views: Sequence[int], keys: Sequence[ImageKey],
        sha256: Sequence[bytes], truncated: Sequence[bool],
    ) -> None:  # fmt: skip
        """Add an array (M, D) of the vectors of ``keys``, ``num_views[i]`` of each, in order."""
        source, start = len(self._sources), 0
        self._sources.append(vectors)
        for i, key in enumerate(keys):
            self._rows[key] = Row(source, start, num_views[i], sha256[i], truncated[i])
            start += num_views[i]

    def find(self, sample: Sample, num_views: int = 1) -> Row | None:
        """Return the row of an image, or None if it must be extracted.

        A row of fewer views than are wanted (``valid`` has become ``train``) is none; of more,
        the first are taken (``train`` has become ``valid``).
        """
        row = self._rows.get(image_key(sample))
        return row if row is not None and row.num_views >= num_views else None

    def blocks(
        self, rows: Sequence[Row], num_views: int = 1, block_vectors: int = 4096
    ) -> Iterator[npt.NDArray[Any]]:
        """Gather the features of ``rows`` in their order, a block at a time.

        Yields:
            (n, D) if ``num_views`` is 1, else (n, num_views, D).
        """
        block_rows = max(1, block_vectors // num_views)
        for i in range(0, len(rows), block_rows):
            part = rows[i : i + block_rows]
            first = self._sources[part[0].source]
            block = np.empty((len(part), num_views, first.shape[1]), first.dtype)
            sources = np.array([row.source for row in part])
            starts = np.array([row.start for row in part])
            for source in np.unique(sources):
                where = np.flatnonzero(sources == source)
                vectors = starts[where, None] + np.arange(num_views)
                block[where] = self._sources[source][vectors]
            yield block[:, 0] if num_views == 1 else block


def partial_folder(cache: Path) -> Path:
    """Return the folder in which a cache is made."""
    return cache.with_name(cache.name + ".partial")


def image_key(sample: Sample) -> ImageKey:
    """Return what an unchanged image is recognised by."""
    return (sample.path, sample.image_bytes, sample.mtime_ns)


class PartialCache:
    """The folder of a cache in the making; use it while holding its lock.

    Args:
        folder: ``CACHE.partial``.
        fingerprint: Of the recipe; rows of another one never mix in.
        num_features: D.
        dtype: Of the stored features.
    """

    def __init__(
        self, folder: Path, fingerprint: str, num_features: int, dtype: np.dtype[Any]
    ) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self._num_features = num_features
        self._dtype = dtype
        # Each as the JSON that the manifest holds of it: a fifth of the memory of dicts.
        self._shards: list[bytes] = []
        self._next_number = 0
        self.engine: EngineFacts | None = None
        self.provenance: dict[str, Any] = {}
        self.was_killed = False
        self.is_running = False

    @property
    def is_worthless(self) -> bool:
        """Whether nothing would be lost with the folder: it has no manifest, or one of no shards.

        A manifest that could not be read or is of another recipe is somebody's work.
        """
        return not self._manifest.exists() or (self.engine is not None and not self._shards)

    @property
    def _manifest(self) -> Path:
        return self.folder / "manifest.json"

    def resume(self, known: KnownRows) -> int:
        """Add the rows of an earlier, unfinished run to ``known``; return how many.

        Raises:
            CacheError: If the folder holds rows of another recipe.
        """
        if not self._manifest.exists():
            return 0
        try:
            manifest = json.loads(self._manifest.read_bytes())
            fingerprint = manifest["fingerprint"]
            if manifest["format"] != _FORMAT or manifest["format_version"] != _FORMAT_VERSION:
                raise ValueError(manifest["format_version"])
            engine = EngineFacts(**manifest["engine"])
            was_killed = bool(manifest["running"])
            provenance = dict(manifest["provenance"])
            shards = list(manifest["shards"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                "unfinished extraction", expected="a readable manifest", found=error,
                where=self._manifest, hint="Start afresh with --rebuild",
            ) from error  # fmt: skip
        if fingerprint != self._fingerprint:
            raise CacheError(
                "unfinished extraction", expected=f"fingerprint {self._fingerprint[:16]}...",
                found=f"{str(fingerprint)[:16]}..., made with other settings", where=self.folder,
                hint="Repeat the command it was started with, or discard it with --rebuild",
            ) from None  # fmt: skip
        self.engine, self.was_killed, self.provenance = engine, was_killed, provenance
        whole = [shard for shard in shards if self._add_shard(shard, known)]
        self._shards = [canonical_json(shard).encode() for shard in whole]
        numbers = (int(shard["file"].split(".")[1]) for shard in whole)
        self._next_number = 1 + max(numbers, default=-1)
        return sum(len(shard["rows"]) for shard in whole)

    def _add_shard(self, shard: dict[str, Any], known: KnownRows) -> bool:
        """Add a listed shard's rows if its file is whole; a damaged one is extracted again."""
        path = self.folder / shard["file"]
        rows = shard["rows"]
        num_views = [int(row.get("views", 1)) for row in rows]  # none: from before there were any
        shape = (sum(num_views), self._num_features)
        wanted_bytes = math.prod(shape) * self._dtype.itemsize
        if not path.is_file() or path.stat().st_size != wanted_bytes:
            return False
        if sha256_file(path) != shard["sha256"]:
            return False
        known.add(
            np.memmap(path, self._dtype, "r", shape=shape),
            num_views,
            [(row["path"], row["image_bytes"], row["mtime_ns"]) for row in rows],
            [bytes.fromhex(row["image_sha256"]) for row in rows],
            [row["truncated"] for row in rows],
        )
        return True

    def start(self, engine: EngineFacts, provenance: dict[str, Any]) -> None:
        """Fix the engine for all shards to come and note that a run is under way.

        ``provenance`` stays with the rows: a later run that only has to finish knows no other.
        """
        self.engine, self.provenance = engine, provenance
        self._write_manifest(running=True)

    def stop(self) -> None:
        """Note that the run ended by itself: nothing crashed the process.

        On a full disk that cannot be noted, which only makes the next run decode more carefully.
        """
        with contextlib.suppress(OSError):
            self._write_manifest(running=False)

    def add_shard(
        self, features: npt.NDArray[Any], rows: Sequence[Mapping[str, Any]], known: KnownRows
    ) -> None:
        """Write one shard, then list it in the manifest, then add it to ``known``.

        Args:
            features: (M, D), in the stored dtype: the vectors of all rows, one after the other.
            rows: Dicts of ``path, image_bytes, mtime_ns, image_sha256 (hex), truncated, views``;
                the views of all rows are M.
            known: Where the rows can be found from now on.

        Raises:
            CacheError: If the disk is full or the folder cannot be written.
        """
        path = self.folder / f"shard.{self._next_number:05d}"
        data = np.ascontiguousarray(features).tobytes()
        try:
            write_bytes(path, data)
            shard = {"file": path.name, "sha256": sha256_file(path), "rows": list(rows)}
            self._shards.append(canonical_json(shard).encode())
            self._next_number += 1
            self._write_manifest(running=True)
        except OSError as error:
            raise disk_error(error, path, len(data)) from error
        self._add_shard(shard, known)

    def _write_manifest(self, *, running: bool) -> None:
        assert self.engine is not None
        self.is_running = running
        manifest = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "fingerprint": self._fingerprint,
            "engine": asdict(self.engine),
            "provenance": self.provenance,
            "running": running,
        }
        with atomic_writer(self._manifest) as file:  # in pieces: it grows with the data set
            file.write(canonical_json(manifest).removesuffix("}").encode() + b',"shards":[')
            for number, shard in enumerate(self._shards):
                file.write(b"," * (number > 0) + shard)
            file.write(b"]}")

    def clear(self) -> None:
        """Forget an earlier run: remove its manifest first, then its shards; keep the lock."""
        self._manifest.unlink(missing_ok=True)
        for shard in self.folder.glob("shard.*"):
            shard.unlink()
        self._shards, self._next_number = [], 0
        self.engine = None
        self.was_killed = self.is_running = False

    def remove(self) -> None:
        """Remove the folder: the cache is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)
