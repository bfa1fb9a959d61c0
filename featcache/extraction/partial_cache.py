"""A cache in the making: ``CACHE.partial/{lock, manifest.json, shard.00000, ...}``.

The manifest alone says what is done: it lists every shard with its sha256. A shard is written and
fsynced before the manifest lists it, so a kill at any instant loses only rows that were not listed
yet.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.writing import remove_partial
from featcache.errors import CacheError
from featcache.extraction.manifest import (
    EngineFacts,
    Manifest,
    ProbeFacts,
    Receipt,
    open_manifest,
    part_manifest,
    write_manifest,
)
from featcache.extraction.shards import (
    Vectors,
    is_whole,
    open_vectors,
    read_table,
    shard_number,
    unreadable_shard,
)
from featcache.files import disk_error

SHARDS_OF_PART = 1_000_000
"""Part I of an extraction in parts has the shards of the numbers from I times this on."""
PLAN_NAME = "plan.json"
_SHARD = re.compile(r"shard\.[0-9]+")
_PART = re.compile(r"part\.[0-9]+\.json")


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
        self.probes, self.facts_of_part = manifest.probes, manifest.facts_of_part or {}
        self.was_killed = manifest.running or self.was_killed
        self._shards = list(manifest.shards)
        numbers = [shard_number(r.file) for r in self._shards]
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
                rows = None
                if is_whole(self.folder, receipt):
                    rows = read_table(path, receipt, self._num_features, self._dtype)
            except ValueError:
                rows = None
            except OSError as error:
                raise unreadable_shard(path, error) from error
            if rows is None:
                self._shards.remove(receipt)
            else:
                yield self._vectors_of(path, receipt), rows

    def _vectors_of(self, path: Path, receipt: Receipt) -> Vectors:
        number, dtype = receipt.num_vectors, self._dtype
        return partial(open_vectors, path, number, self._num_features, dtype)

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
        return [path for path in found if shard_number(path.name) // SHARDS_OF_PART == self.part]

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
        self._next_number = max(self._next_number, 1 + shard_number(receipt.file))
        self._has_unlisted = True
        if not self._is_together:
            self._list()
        return self._vectors_of(path, receipt)

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
        write_manifest(
            self.file,
            Manifest(
                self._fingerprint, self.engine, self.provenance, running, tuple(self._shards),
                self.probes, self._num_reserved, self.facts_of_part,
            ),
        )  # fmt: skip

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
