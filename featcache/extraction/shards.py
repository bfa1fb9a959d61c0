"""A cache in the making: ``CACHE.partial/{lock, manifest.json, shard.00000, ...}``.

A shard is the raw features of some images, one vector of each or V of an image to train on, and
behind them a table in JSON: of each image the path, size, time and hash, and how many vectors it
has (0: those of the same content elsewhere). The manifest alone says what is done: it lists every
shard with its sha256. A shard is written and fsynced before the manifest lists it, so a kill at any
instant loses only rows that were not listed yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.writing import remove_partial
from featcache.errors import CacheError
from featcache.files import canonical_json, disk_error, json_sha256, sha256_file, write_bytes

Vectors = Callable[[], npt.NDArray[Any]]
"""Opens (M, D) features, mapped: their pages leave the memory with the array."""

_FORMAT = "featcache-partial"
_SHARD = re.compile(r"shard\.[0-9]+")
_FORMAT_VERSION = 2  # 1 kept the tables in the manifest, which then grew with the data set


@dataclass(frozen=True)
class EngineFacts:
    """What must not change between the shards of one cache."""

    engine: str
    precision: str
    batch_size: int
    num_threads: int
    device_type: str


@dataclass(frozen=True)
class Receipt:
    """A shard that was written: its line in the manifest.

    Attributes:
        file: Its name.
        num_rows: Images in its table.
        num_vectors: M, vectors of all of them together.
        sha256: Of the file, 64 hex digits.
    """

    file: str
    num_rows: int
    num_vectors: int
    sha256: str


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


class PartialCache:
    """The folder of a cache in the making; use it while holding its lock.

    Until ``start`` nothing in it is changed.

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
        self._shards: list[Receipt] = []
        self._next_number = 0
        self.engine: EngineFacts | None = None
        self.provenance: dict[str, Any] = {}
        self.was_killed = False
        self.is_running = False
        self._is_removed = False

    @property
    def _manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def _probing(self) -> Path:
        return self.folder / "probing"

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """Leave a mark while images are decoded before ``start``: an image may kill the process.

        On a full disk there is none, which only means that such an image kills the next run too.
        """
        with contextlib.suppress(OSError):
            self._probing.touch()
        try:
            yield
        finally:
            self._probing.unlink(missing_ok=True)

    def open(self) -> bool:
        """Read the manifest of an earlier, unfinished run; return whether there is one.

        Raises:
            CacheError: If it cannot be read, or lists shards of another recipe.
        """
        self.was_killed = self._probing.exists()
        if not self._manifest.exists():
            return False
        try:
            manifest = json.loads(self._manifest.read_bytes())
            if manifest["sha256"] != json_sha256(manifest, without="sha256"):
                raise ValueError("one whose sha256 is another")
            fingerprint = manifest["fingerprint"]
            if manifest["format"] != _FORMAT or manifest["format_version"] != _FORMAT_VERSION:
                raise ValueError(f"format version {manifest['format_version']}")
            engine = EngineFacts(**manifest["engine"])
            was_killed = bool(manifest["running"]) or self.was_killed
            provenance = dict(manifest["provenance"])
            shards = [_read_receipt(line) for line in manifest["shards"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
        self._shards = shards
        self._next_number = 1 + max((_number(receipt.file) for receipt in shards), default=-1)
        return True

    def read_shards(self) -> Iterator[tuple[Vectors, list[dict[str, Any]]]]:
        """Yield what opens the vectors (M, D), and the table, of every listed shard that is whole.

        A damaged one is taken off the list: its images are extracted again.
        """
        for receipt in list(self._shards):
            path = self.folder / receipt.file
            if not path.is_file() or sha256_file(path) != receipt.sha256:
                self._shards.remove(receipt)
                continue
            with path.open("rb") as file:
                file.seek(receipt.num_vectors * self._num_features * self._dtype.itemsize)
                rows = json.loads(file.read())
            yield partial(self._map, path, receipt.num_vectors), rows

    def _map(self, path: Path, num_vectors: int) -> npt.NDArray[Any]:
        shape = (num_vectors, self._num_features)
        if num_vectors == 0:  # a file of a table alone cannot be mapped as an array
            return np.empty(shape, self._dtype)
        return np.memmap(path, self._dtype, "r", shape=shape)

    def forget(self) -> None:
        """Take nothing over from an earlier run; its files stay until ``start``."""
        self._shards, self._next_number = [], 0
        self.engine, self.provenance = None, {}
        self.was_killed = self.is_running = False

    def start(self, engine: EngineFacts, provenance: dict[str, Any]) -> None:
        """Fix the engine for all shards to come and note that a run is under way.

        ``provenance`` stays with the rows: a later run that only has to finish knows no other.
        """
        self.engine, self.provenance = engine, provenance
        self._write_manifest(running=True)
        listed = {receipt.file for receipt in self._shards}
        for path in self._find_shards():  # of a run that was forgotten, or is damaged
            if path.name not in listed:
                path.unlink()

    def _find_shards(self) -> list[Path]:
        return [path for path in self.folder.glob("shard.*") if _SHARD.fullmatch(path.name)]

    def stop(self) -> None:
        """Note that the run ended by itself: nothing crashed the process.

        On a full disk that cannot be noted, which only makes the next run decode more carefully.
        """
        if self.engine is None:  # cleared: there is nothing to note it of
            return
        with contextlib.suppress(OSError, CacheError):
            self._write_manifest(running=False)

    @property
    def next_shard(self) -> Path:
        """The file of the next shard."""
        return self.folder / f"shard.{self._next_number:05d}"

    def add_shard(self, receipt: Receipt) -> Vectors:
        """List a shard in the manifest; return what opens its vectors, (M, D).

        Raises:
            CacheError: If the disk is full or the folder cannot be written.
        """
        path = self.folder / receipt.file
        self._shards.append(receipt)
        self._next_number = 1 + _number(receipt.file)
        try:
            self._write_manifest(running=True)
        except OSError as error:
            raise disk_error(error, path, path.stat().st_size) from error
        return partial(self._map, path, receipt.num_vectors)

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
            "shards": [asdict(receipt) for receipt in self._shards],
        }
        signed = manifest | {"sha256": json_sha256(manifest, without="sha256")}
        write_bytes(self._manifest, canonical_json(signed).encode())

    def clear(self) -> None:
        """Forget an earlier run: remove its manifest first, then its shards; keep the lock."""
        self._manifest.unlink(missing_ok=True)
        self._probing.unlink(missing_ok=True)
        for shard in self._find_shards():
            shard.unlink()
        self.forget()

    def abandon(self) -> None:
        """Remove the folder where nothing would be lost with it; else shards stay for resuming."""
        if self.is_worthless:
            self.remove()
        elif self.is_running:
            self.stop()

    @property
    def is_worthless(self) -> bool:
        """Whether nothing would be lost with the folder: it has no manifest, or one of no shards.

        A manifest that could not be read or is of another recipe is somebody's work.
        """
        if self._is_removed:  # what is there by now is the next writer's
            return False
        return not self._manifest.exists() or (self.engine is not None and not self._shards)

    def remove(self) -> None:
        """Remove the folder, the lock last: until then the next writer has to wait."""
        self._is_removed = True
        remove_partial(self.folder)


def _number(file: str) -> int:
    return int(file.removeprefix("shard."))


def _read_receipt(line: Any) -> Receipt:
    """Return a line of the manifest if it names a file of this folder and its sizes."""
    receipt = Receipt(**line)
    if not _SHARD.fullmatch(receipt.file) or not isinstance(receipt.sha256, str):
        raise ValueError(f"{receipt.file!r:.80}")
    if any(type(n) is not int or n < 0 for n in (receipt.num_rows, receipt.num_vectors)):
        raise ValueError(f"sizes of {receipt.file}")
    return receipt
