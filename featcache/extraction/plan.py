"""Plan an extraction: what is known of its images, and which are left to be run.

Reads: the cache that is there, an unfinished run, images of sizes that are known. Writes: nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch

from featcache.backbones.engine import Engine
from featcache.cache.writing import CACHE, cache_lock, partial_folder
from featcache.data.dataset import ImageDataset
from featcache.data.hashing import hash_images
from featcache.errors import CacheError, DataError
from featcache.extraction.earlier import refuse_misread
from featcache.extraction.ledger import Ledger
from featcache.extraction.manifest import Manifest, Receipt
from featcache.extraction.options import ExtractionOptions, parse_max_errors
from featcache.extraction.partial_cache import PartialCache
from featcache.extraction.recipe import Recipe
from featcache.extraction.shards import Vectors
from featcache.extraction.update import (
    check_update,
    find_changes,
    holds,
    open_existing,
    refuse_other_images,
)
from featcache.extraction.view_stream import resolve_workers
from featcache.extraction.workers.plans import (
    Part,
    Plan,
    failures_of,
    merge_parts,
    merging_held,
    read_plan,
)
from featcache.files import make_folder
from featcache.formatting import count
from featcache.outputs import Output
from featcache.renames import remove_temporaries


class ShardFolder(Protocol):
    """Where the shards of a cache go."""

    @property
    def next_shard(self) -> Path:
        """The file of the next shard."""

    def clear(self) -> None:
        """Drop all shards."""


class Work(Protocol):
    """What ``ShardWriter`` needs of a cache to be made: a ``Job``, or a worker's share of one."""

    @property
    def recipe(self) -> Recipe:
        """What makes the features."""

    @property
    def engine(self) -> Engine | None:
        """What runs the network; chosen."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored features."""

    @property
    def ledger(self) -> Ledger:
        """What is known of the images."""

    @property
    def partial(self) -> ShardFolder:
        """Where the shards go."""

    def list_shard(
        self, receipt: Receipt, positions: Sequence[int], table: Sequence[Mapping[str, Any]]
    ) -> Vectors:
        """Let a shard count; return what opens its vectors. Its rows are images ``positions``."""


class Probes(NamedTuple):
    """A few images that engines are checked on.

    Attributes:
        images: Decoded, each (S, S) or (S, S, 3) uint8.
        features: Of the library's own network in fp32, (n, D) float32.
    """

    images: tuple[npt.NDArray[np.uint8], ...]
    features: npt.NDArray[np.float32]


class Job:
    """One cache to be made: its images, what is known of them, and what makes the rest.

    Attributes:
        path: The cache.
        dataset: The images.
        recipe: What makes features of them.
        options: What the user asked for.
        dtype: Of the stored features.
        num_views: Split -> vectors of each of its images.
        partial: The unfinished cache. Change it only while holding its lock.
        ledger: What is known of the images.
        old: The cache that is there already and will be updated, or None.
        output: Where the cache is to be, checked.
        provenance: How the rows were made.
        engine: What runs the network; None until it is chosen.
        probes: What it was chosen by; None until it is.
        part_manifests: What parts of it have made, if the plain command merges some.
        num_planned: Images of this part of it.
        images_per_second: How fast it went, None where nothing was run.

    Raises:
        CacheError: If the cache that is there is another one: see ``update``.
    """

    def __init__(
        self, path: Path, dataset: ImageDataset, recipe: Recipe, options: ExtractionOptions
    ) -> None:
        self.path, self.dataset, self.recipe, self.options = path, dataset, recipe, options
        self.dtype = np.dtype(recipe.feature_dtype).newbyteorder("<")
        self.num_views = {
            split: recipe.view_rules.for_split(split, dataset.splits).num_views
            for split in dataset.splits
        }
        part = 0 if options.part is None else Part.parse(options.part).number
        self.partial = PartialCache(
            partial_folder(path), recipe.fingerprint, recipe.backbone.num_features, self.dtype, part
        )
        self.part_manifests: tuple[Manifest, ...] = ()
        self.num_planned = 0
        self.ledger = Ledger(dataset, self.num_views, parse_max_errors(options.max_errors))
        self.provenance: dict[str, Any] = {}
        self.engine: Engine | None = None
        self.probes: Probes | None = None
        self.images_per_second: float | None = None
        self._open_old()

    def _open_old(self) -> None:
        self.output = Output(self.path, "CACHE", CACHE)
        self.old = open_existing(self.path, self.recipe, rebuild=self.options.rebuild)
        if self.old is not None:
            check_update(self.old, self.dataset, self.options.limit)
            refuse_misread(self.old, self.dataset)
        if self.options.rehash or not self.is_up_to_date:  # else nothing will be written
            self.output.check()

    def release_engine(self) -> None:
        """Free what the engine holds, as nothing is run here any more; its facts stay."""
        if self.engine is not None:
            self.engine = replace(self.engine, forward=_never_run, is_frozen=_never_changed)

    def _is_replaced(self) -> bool:
        return self.path.exists() if self.old is None else not self.old.container.is_current()

    @property
    def is_up_to_date(self) -> bool:
        """Whether the cache that is there holds just these images, by name, size and time."""
        old = self.old
        return (
            old is not None
            and not old.failures
            and self.is_listed_alike
            and holds(old, self.dataset, frozenset())
        )

    @property
    def is_listed_alike(self) -> bool:
        """Whether the cache that is there remembers just these options of the listing."""
        stored = None if self.old is None else self.old.provenance.get("listing", {})
        return stored == self.options.listing.as_json()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody else write the cache; leave no folder behind where nothing was gained."""
        make_folder(self.path.parent)
        with self._lock():
            try:
                if self._is_replaced():  # before the lock was ours
                    self._open_old()
                yield
            finally:
                self.partial.abandon()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Let nobody else write the cache; of parts, on a host without locks too, merge them."""
        folder, name, say = self.partial.folder, self.path.name, self.options.say
        if self._read_plan() is not None:
            with merging_held(self.partial, name, say):
                yield
            return
        with cache_lock(self.path, say):
            if self._read_plan() is not None:
                raise CacheError(
                    f"cache {name}", expected="no other writer", where=folder,
                    found="parts of it, begun just now", hint="Run the same command again",
                )  # fmt: skip
            yield

    def _read_plan(self) -> Plan | None:
        """Return the plan of parts; with --rebuild a damaged one is none."""
        try:
            return read_plan(self.partial.folder)
        except CacheError:
            if not self.options.rebuild:
                raise
            return None

    def list_shard(
        self, receipt: Receipt, positions: Sequence[int], table: Sequence[Mapping[str, Any]]
    ) -> Vectors:
        """List a shard in the manifest; return what opens its vectors: see ``Work``."""
        del positions, table  # they are in the shard, and in the ledger
        return self.partial.add_shard(receipt)

    def remove_leftovers(self) -> None:
        """Remove what a run left that was killed between publishing its cache and its own end."""
        folder = self.partial.folder
        if folder.exists():
            # Of another recipe, or in use: somebody's work.
            with contextlib.suppress(CacheError), self._lock():
                if (plan := read_plan(folder)) and plan.fingerprint != self.recipe.fingerprint:
                    return
                self.partial.open()
                remove_temporaries(self.path)
                self.partial.remove()

    def read_known(self, device: torch.device) -> list[int]:
        """Enter what the old cache and an unfinished run know into the ledger.

        Returns:
            The positions of images whose content may be known: see ``Ledger.match``.

        Raises:
            CacheError: If the unfinished run is one of another recipe, precision or kind of device,
                and nobody asked for a rebuild.
        """
        try:
            self.partial.open()
            if not self.partial.part:
                name, say = self.path.name, self.options.say
                self.part_manifests = merge_parts(self.partial, self.recipe.fingerprint, name, say)
                self.partial.was_killed |= any(part.running for part in self.part_manifests)
            self.check_unfinished(device)
        except CacheError:
            if not self.options.rebuild:
                raise
            self.partial.forget()
        if self.old is not None:
            self.provenance = dict(self.old.provenance)
            self.ledger.add_cache(self.old)
        num_resumed = sum(self.ledger.add_shard(*shard) for shard in self.partial.read_shards())
        if num_resumed:
            self.provenance = self.partial.provenance or self.provenance
            self.options.say(f"Resuming {self.path.name}: {count(num_resumed, 'image')} done.")
        suspects = self.ledger.match(rehash=self.options.rehash)
        self._enter_failures()
        return suspects

    def _enter_failures(self) -> None:
        """Take over what failed in parts: it is tried again by the next ``extract``."""
        failed: dict[str, tuple[int, int, str]] = {}
        for manifest in self.part_manifests:
            failed |= failures_of(manifest)
        for position, sample in enumerate(self.dataset.samples if failed else ()):
            size, time, reason = failed.get(sample.path, (-1, 0, ""))
            # One that has failed may have been read by the same part, run again.
            is_same = (size, time) == (sample.image_bytes, sample.mtime_ns)
            if is_same and self.ledger.wants(position):
                self._fail_again(position, reason)

    def _fail_again(self, position: int, reason: str) -> None:
        try:
            self.ledger.fail(position, reason)
        except DataError as error:
            raise DataError(
                error.what, expected=error.expected, found=error.found,
                hint="Run the parts that have such failures again, which tries them anew, or allow "
                "more with --max-errors",
            ) from None  # fmt: skip

    def check_unfinished(self, device: torch.device) -> None:
        """Refuse to go on with rows of another precision or kind of device.

        Raises:
            CacheError: If those that are there are such.
        """
        fixed, precision = self.partial.engine, self.options.precision
        if fixed and (fixed.precision, fixed.device_type) != (precision, device.type):
            raise CacheError(
                "unfinished extraction", expected=f"{fixed.precision} on {fixed.device_type}",
                found=f"{precision} on {device.type}", where=self.partial.folder,
                hint="Finish it with the same --precision and --device, or pass --rebuild",
            )  # fmt: skip


def find_known(jobs: Sequence[Job], device: torch.device) -> Sequence[int]:
    """Find which images of some caches of one data set need no forward pass.

    Images whose content may be known are hashed, once for all caches.

    Returns:
        The positions of the images that are left to be run for at least one of them, in the order
        in which they are read fastest.

    Raises:
        CacheError: If an older cache knows none of the images, or an unfinished run is another's.
    """
    suspects = set[int]().union(*(job.read_known(device) for job in jobs))
    if suspects:
        options, dataset = jobs[0].options, jobs[0].dataset
        positions = dataset.reading_order(sorted(suspects))
        options.say(f"Hashing {count(len(positions), 'image')} whose content may be known.")
        samples = [dataset.samples[position] for position in positions]
        hashes = hash_images(dataset, samples, resolve_workers(options.workers))
        for position, sha256 in zip(positions, hashes, strict=True):
            for job in jobs:
                if sha256 is not None:
                    job.ledger.recognise(position, sha256)
    for job in jobs:
        if job.old is not None:
            refuse_other_images(job.old, find_changes(job.old, job.dataset, job.ledger))
    dataset = jobs[0].dataset
    every = range(len(dataset.samples))
    wanted = (p for p in every if any(job.ledger.wants(p) for job in jobs))
    return dataset.reading_order(wanted)


def _never_run(batch: torch.Tensor) -> NoReturn:
    raise AssertionError("the engine was released")


def _never_changed() -> bool:
    return True
