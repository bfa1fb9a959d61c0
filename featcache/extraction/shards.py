"""A cache in the making: ``CACHE.partial/{lock, manifest.json, shard.00000, ...}``.

A shard is the raw features of some images, one vector of each or V of an image to train on, and
behind them a table in JSON: of each image the path, size, time and hash, and how many vectors it
has (0: those of the same content elsewhere). The manifest alone says what is done: it lists every
shard with its sha256. A shard is written and fsynced before the manifest lists it, so a kill at any
instant loses only rows that were not listed yet.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.row_reader import RowReader
from featcache.cache.writing import remove_partial
from featcache.errors import CacheError
from featcache.files import (
    canonical_json,
    disk_error,
    json_sha256,
    read_regular,
    sha256_stream,
    write_bytes,
)
from featcache.untrusted import open_regular, parse_json, parse_json_object, reading_hint

Vectors = Callable[[], RowReader]
"""Opens (M, D) features, which are read as they are asked for."""

_MAX_MANIFEST_BYTES = 1 << 28  # 150 bytes a shard of 16 MiB: features of 30 TB
_MAX_COUNT = 1 << 48  # of rows and vectors
SHARDS_OF_PART = 1_000_000
"""Part I of an extraction in parts has the shards of the numbers from I times this on."""
PLAN_NAME = "plan.json"
_MAX_SHARDS = 10**9  # their numbers have nine digits at most
_MAX_VIEWS = (1 << 16) - 1  # of an image, as the ledger counts them
_FORMAT = "featcache-partial"
_SHARD = re.compile(r"shard\.[0-9]+")
_PART = re.compile(r"part\.[0-9]+\.json")
_NO_FILE = {errno.ENOENT, errno.EISDIR, errno.EINVAL}  # of ``open_regular``: nothing can be lost
_FORMAT_VERSION = 2  # 1 kept the tables in the manifest, which then grew with the data set


@dataclass(frozen=True)
class EngineFacts:
    """What must not change between the shards of one cache."""

    engine: str
    precision: str
    batch_size: int
    num_threads: int
    device_type: str

    @property
    def is_possible(self) -> bool:
        """Whether the values, which come from files, are of the right kinds and in their ranges."""
        texts = (self.engine, self.precision, self.device_type)
        counts = ((self.batch_size, 1 << 16), (self.num_threads, 1 << 12))
        return all(isinstance(text, str) for text in texts) and all(
            type(count) is int and 1 <= count <= most for count, most in counts
        )


@dataclass(frozen=True)
class ProbeFacts:
    """What the library's own fp32 network makes of the probed images: every engine is within it.

    Attributes:
        pixels_sha256: Of each image as it was decoded, 64 hex digits.
        features: Of each, (D,) float32, one after the other in base64.
    """

    pixels_sha256: tuple[str, ...]
    features: str

    @classmethod
    def of(
        cls, probes: Sequence[npt.NDArray[np.uint8]], features: npt.NDArray[np.float32]
    ) -> ProbeFacts:  # fmt: skip
        """Note features (n, D) of n decoded images."""
        data = np.ascontiguousarray(features, "<f4").tobytes()
        return cls(tuple(map(_pixels_sha256, probes)), base64.b64encode(data).decode("ascii"))

    @classmethod
    def from_json(cls, value: Any) -> ProbeFacts | None:
        """Read what ``asdict`` made of one; None where a manifest has none.

        Raises:
            ValueError: If it is something else.
        """
        if value is None:
            return None
        if not (isinstance(value, dict) and value.keys() == {"pixels_sha256", "features"}):
            raise ValueError(f"probes of {value!r:.80}")
        hashes, features = value["pixels_sha256"], value["features"]
        if not isinstance(hashes, list) or not all(isinstance(h, str) for h in [*hashes, features]):
            raise ValueError(f"probes of {hashes!r:.80}")
        base64.b64decode(features.encode(), validate=True)
        return cls(tuple(hashes), features)

    def features_of(
        self, probes: Sequence[npt.NDArray[np.uint8]], num_features: int
    ) -> npt.NDArray[np.float32] | None:
        """Return the features (n, D), None where these are other images."""
        data = base64.b64decode(self.features)
        is_same = self.pixels_sha256 == tuple(map(_pixels_sha256, probes))
        if not probes or not is_same or len(data) != 4 * num_features * len(probes):
            return None
        features = np.frombuffer(data, "<f4").reshape(len(probes), num_features)
        return features.astype(np.float32) if np.isfinite(features).all() else None


def _pixels_sha256(pixels: npt.NDArray[np.uint8]) -> str:
    head = canonical_json(list(pixels.shape)).encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


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
        part: Number of the part of an extraction in parts, which has a manifest and shards of its
            own; 0 for a whole one.

    Attributes:
        engine: What must not change between the shards; None before it is chosen.
        probes: What the library's own network makes of some images; None before ``engine`` is.
        provenance: How the rows were made.
        was_killed: Whether an earlier run did not end by itself.
        is_running: Whether the manifest says that a run is under way.
        is_in_parts: Whether the parts of a plan belong to it; ``start`` removes those that do not.
        facts_of_part: What the manifest of a part says besides; see ``workers.plans``.
        guard: Called before the manifest is written; may refuse.
    """

    def __init__(
        self, folder: Path, fingerprint: str, num_features: int, dtype: np.dtype[Any],
        part: int = 0,
    ) -> None:  # fmt: skip
        self.folder, self.part = folder, part
        self._fingerprint = fingerprint
        self._num_features = num_features
        self._dtype = dtype
        self._shards: list[Receipt] = []
        self._next_number = self._num_reserved = part * SHARDS_OF_PART
        self.facts_of_part: dict[str, Any] = {}
        self.guard: Callable[[], object] = lambda: None
        self.engine: EngineFacts | None = None
        self.probes: ProbeFacts | None = None
        self.provenance: dict[str, Any] = {}
        self.was_killed = False
        self.is_running = False
        self._is_removed = self._is_together = self._has_unlisted = False
        self.is_in_parts = False

    @property
    def file(self) -> Path:
        """The manifest."""
        return self.folder / (part_manifest(self.part) if self.part else "manifest.json")

    @property
    def _probing(self) -> Path:
        return self.folder / (f"probing.{self.part}" if self.part else "probing")

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
        if not self.file.exists():
            return False
        manifest = open_manifest(self.file)
        if manifest.fingerprint != self._fingerprint:
            raise CacheError(
                "unfinished extraction", expected=f"fingerprint {self._fingerprint[:16]}...",
                found=f"{manifest.fingerprint[:16]}..., made with other settings",
                where=self.folder,
                hint="Repeat the command it was started with, or discard it with --rebuild",
            ) from None  # fmt: skip
        self.engine, self.provenance = manifest.engine, manifest.provenance
        self.probes, self.facts_of_part = manifest.probes, manifest.facts_of_part
        self.was_killed = manifest.running or self.was_killed
        self._shards = list(manifest.shards)
        numbers = [_number(r.file) for r in self._shards]
        if self.part or (self.folder / PLAN_NAME).exists():  # else all numbers are ours
            numbers = [n for n in numbers if n // SHARDS_OF_PART == self.part]
        highest = 1 + max(numbers, default=-1)
        first = self.part * SHARDS_OF_PART
        self._next_number = self._num_reserved = max(first, highest, manifest.num_reserved)
        return True

    def take_over(self, manifest: Manifest) -> int:
        """List the shards of a part in this manifest too; return how many rows they have."""
        listed = {receipt.file for receipt in self._shards}
        self._shards += [receipt for receipt in manifest.shards if receipt.file not in listed]
        return sum(receipt.num_rows for receipt in manifest.shards)

    def read_shards(self) -> Iterator[tuple[Vectors, list[dict[str, Any]]]]:
        """Yield what opens the vectors (M, D), and the table, of every listed shard that is whole.

        A damaged one is taken off the list: its images are extracted again.

        Raises:
            CacheError: If one cannot be read. That may pass, so it stays on the list.
        """
        for receipt in list(self._shards):
            path = self.folder / receipt.file
            try:
                rows = self._read_table(path, receipt) if is_whole(self.folder, receipt) else None
            except ValueError:
                rows = None
            except OSError as error:
                raise _unreadable(path, error) from error
            if rows is None:
                self._shards.remove(receipt)
            else:
                yield partial(self._open, path, receipt.num_vectors), rows

    def _read_table(self, path: Path, receipt: Receipt) -> list[dict[str, Any]]:
        """Return the rows of a shard; raise ValueError if they are not such as were written."""
        num_bytes = receipt.num_vectors * self._num_features * self._dtype.itemsize
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

    def _open(self, path: Path, num_vectors: int) -> RowReader:
        def failed(error: OSError | None) -> CacheError:
            if error is not None and error.errno not in _NO_FILE:
                return _unreadable(path, error)
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

        return RowReader(open_shard, 0, (num_vectors, self._num_features), self._dtype, failed)

    def forget(self) -> None:
        """Take nothing over from an earlier run; its files stay until ``start``."""
        self._shards = []
        self.engine, self.probes, self.provenance = None, None, {}
        self.facts_of_part = {}
        self.was_killed = self.is_running = False

    def start(
        self, engine: EngineFacts, provenance: dict[str, Any], probes: ProbeFacts | None = None
    ) -> None:
        """Fix the engine for all shards to come and note that a run is under way.

        ``provenance`` stays with the rows: a later run that only has to finish knows no other.
        """
        self.engine, self.provenance, self.probes = engine, provenance, probes
        self._write_manifest(running=True)
        if not self.is_in_parts:
            self._discard_parts()
        listed = {receipt.file for receipt in self._shards}
        for path in self._find_shards():  # of a run that was forgotten, or is damaged
            if path.name not in listed:
                path.unlink()

    def _discard_parts(self) -> None:
        """Remove the plan and the manifests of parts, if it is not a part itself."""
        for path in self.folder.glob("p*.json") if not self.part else ():
            if path.name == PLAN_NAME or _PART.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _find_shards(self) -> list[Path]:
        """Return the shards that are there, of a part its own."""
        found = [path for path in self.folder.glob("shard.*") if _SHARD.fullmatch(path.name)]
        if not self.part:
            return found
        return [path for path in found if _number(path.name) // SHARDS_OF_PART == self.part]

    def note_end(self, provenance: dict[str, Any]) -> None:
        """Note that all is done, as a part does it.

        Raises:
            CacheError: If the disk is full or the folder cannot be written.
        """
        self.provenance = provenance
        try:
            self._write_manifest(running=False)
        except OSError as error:
            raise disk_error(error, self.file, 0) from error

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

    def reserve(self, number: int) -> int:
        """Set so many names of shards aside for a worker; return the number of the first.

        Whatever becomes of this process, no later one gives them out again: a worker of it may
        still be writing. The manifest is written for every hundredth name only.
        """
        first = self._next_number
        self._next_number += number
        if self._next_number > self._num_reserved:
            self._num_reserved = self._next_number + 100
            self._write_manifest(running=True)
        return first

    def add_shard(self, receipt: Receipt) -> Vectors:
        """List a shard in the manifest; return what opens its vectors, (M, D).

        Raises:
            CacheError: If the disk is full or the folder cannot be written.
        """
        path = self.folder / receipt.file
        self._shards.append(receipt)
        self._next_number = max(self._next_number, 1 + _number(receipt.file))
        self._has_unlisted = True
        if not self._is_together:
            self._list()
        return partial(self._open, path, receipt.num_vectors)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """List all shards that are added in the block at its end, with one manifest.

        Writing it takes an fsync, 18 ms here. A coordinator of 100 workers that hand in shards of
        300 rows at once lists 136,000 rows a second (benchmarks/scale.py); one by one it was a
        tenth of that.
        """
        self._is_together = True
        try:
            yield
        finally:
            self._is_together = False
            if self._has_unlisted and self.engine is not None:
                self._list()

    def _list(self) -> None:
        self._has_unlisted = False
        try:
            self._write_manifest(running=True)
        except OSError as error:
            raise disk_error(error, self.file, 0) from error

    def _write_manifest(self, *, running: bool) -> None:
        assert self.engine is not None
        self.guard()
        self.is_running = running
        manifest = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "fingerprint": self._fingerprint,
            "engine": asdict(self.engine),
            "provenance": self.provenance,
            "running": running,
            "shards": [asdict(receipt) for receipt in self._shards],
            **({"probes": asdict(self.probes)} if self.probes else {}),
            **({"num_reserved": self._num_reserved} if self._num_reserved else {}),
            **({"part": self.facts_of_part} if self.part else {}),
        }
        signed = manifest | {"sha256": json_sha256(manifest, without="sha256")}
        write_bytes(self.file, canonical_json(signed).encode())

    def clear(self) -> None:
        """Forget an earlier run: remove its manifest first, then its shards; keep the lock."""
        self.file.unlink(missing_ok=True)
        self._probing.unlink(missing_ok=True)
        for shard in self._find_shards():
            shard.unlink()
        self.forget()
        self.is_in_parts = False
        self._discard_parts()

    def abandon(self) -> None:
        """Remove the folder where nothing would be lost with it; else shards stay for resuming."""
        if self.part and self.is_worthless:
            self.file.unlink(missing_ok=True)
        elif self.is_worthless:
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
        if self.part and self.facts_of_part.get("is_done"):
            return False
        if not self.part and (self.folder / PLAN_NAME).exists():
            return False
        return not self.file.exists() or (self.engine is not None and not self._shards)

    def remove(self) -> None:
        """Remove the folder, the lock last: until then the next writer has to wait."""
        self._is_removed = True
        remove_partial(self.folder)


def part_manifest(part: int) -> str:
    """Return the name of the manifest of a part."""
    return f"part.{part}.json"


def _number(file: str) -> int:
    return int(file.removeprefix("shard."))


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        fingerprint: Of the recipe.
        engine: What must not change between the shards.
        provenance: How the rows were made.
        running: Whether the run did not end by itself.
        shards: The shards that count.
        probes: What the library's own network makes of some images; None in older manifests.
        num_reserved: Numbers of shards below it may have been given to workers.
        facts_of_part: Of the manifest of a part, as it stands there.
    """

    fingerprint: str
    engine: EngineFacts
    provenance: dict[str, Any]
    running: bool
    shards: tuple[Receipt, ...]
    probes: ProbeFacts | None = None
    num_reserved: int = 0
    facts_of_part: dict[str, Any] = field(default_factory=dict)


def open_manifest(file: Path) -> Manifest:
    """Read and check the manifest of an unfinished extraction.

    Raises:
        CacheError: If it cannot be read, or is not what ``PartialCache`` writes.
    """
    try:
        return read_manifest(file)
    except (OSError, ValueError) as error:
        hint = "Start afresh with --rebuild"
        if isinstance(error, OSError):  # of the disk: it may pass
            hint = reading_hint(error, hint)
        raise CacheError(
            "unfinished extraction", expected="a readable manifest",
            found=getattr(error, "strerror", None) or error, where=file, hint=hint,
        ) from error  # fmt: skip


def read_manifest(file: Path) -> Manifest:
    """Read and check the manifest of an unfinished extraction.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not what ``PartialCache`` writes; says in a few words why.
    """
    facts = parse_json_object(read_regular(file, max_bytes=_MAX_MANIFEST_BYTES))
    if facts.get("sha256") != json_sha256(facts, without="sha256"):
        raise ValueError("one whose sha256 is another")
    version = facts.get("format_version")
    if facts.get("format") != _FORMAT or version != _FORMAT_VERSION:
        raise ValueError(f"format version {version!r:.20}")
    try:
        engine, provenance = EngineFacts(**facts["engine"]), facts["provenance"]
        if not isinstance(facts["fingerprint"], str) or not isinstance(provenance, dict):
            raise ValueError("one of another fingerprint or provenance")
        if not engine.is_possible:
            raise ValueError(f"an engine of {facts['engine']!r:.80}")
        shards = tuple(_read_receipt(line) for line in facts["shards"])
        probes, num_reserved = (
            ProbeFacts.from_json(facts.get("probes")),
            facts.get("num_reserved", 0),
        )
        if type(num_reserved) is not int or not 0 <= num_reserved < _MAX_SHARDS:
            raise ValueError(f"{num_reserved!r:.20} reserved shards")
        facts_of_part = facts.get("part", {})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"one without {error}") from error
    return Manifest(
        facts["fingerprint"], engine, provenance, bool(facts.get("running")), shards, probes,
        num_reserved, facts_of_part if isinstance(facts_of_part, dict) else {},
    )  # fmt: skip


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
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CacheError:
    return CacheError(
        "shard", expected="a file that can be read", found=error.strerror or error, where=path,
        hint="Run the same command again. If that does not help, remove this file and repeat the "
        "extract command: it makes that shard again",
    )  # fmt: skip


def _read_receipt(line: Any) -> Receipt:
    """Return a line of the manifest if it names a file of this folder and its sizes."""
    receipt = Receipt(**line)
    name, sha256 = receipt.file, receipt.sha256
    # A number of more digits is none that ``next_shard`` came to.
    if not re.fullmatch(r"shard\.[0-9]{5,9}", str(name)) or not isinstance(sha256, str):
        raise ValueError(f"a shard {name!r:.80}")
    sizes = (receipt.num_rows, receipt.num_vectors)
    if any(type(n) is not int or not 0 <= n <= _MAX_COUNT for n in sizes):
        raise ValueError(f"sizes of {name}")
    return receipt


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
