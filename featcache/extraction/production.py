"""Produce a cache: known contents and pending images -> shards -> one file.

Reads: images. Writes: ``CACHE.partial/`` while working, then ``CACHE``.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from featcache.backbones.backbone import state_sha256
from featcache.backbones.engine import Engine, build_engine
from featcache.cache.provenance import MAX_PARITY
from featcache.cache.reading import Cache, Failure
from featcache.cache.writing import SplitRows, partial_folder, write_rows
from featcache.data.dataset import ImageDataset, Sample
from featcache.errors import BackboneError, CacheError, DataError, FeatcacheWarning, printable
from featcache.extraction.intake import Intake
from featcache.extraction.inventory import Inventory
from featcache.extraction.pipeline import (
    FeatureBatch,
    Lane,
    find_bottleneck,
    images_under_way,
    stream_features,
)
from featcache.extraction.recipe import Recipe, decode_probes
from featcache.extraction.shards import SHARD_BYTES, SHARD_ROWS, EngineFacts, PartialCache
from featcache.files import remove_temporaries
from featcache.precision import PARITY_BOUNDS
from featcache.runtime import Interrupted, Say, Timer, environment_facts, held_signals


class Production:
    """One extraction under way: find what is known, run the rest, write the cache.

    Use it while holding the lock of ``partial``, in this order: ``find_known``, then, if anything
    is ``pending``, ``choose_engine`` and ``produce``, then ``finish``.

    Args:
        path: The cache to make.
        dataset: The images.
        recipe: What makes features of them.
        allowed: Failed images allowed per split and class: a count (int) or a share (float).
        say: Where lines for people go.
    """

    def __init__(
        self, path: Path, dataset: ImageDataset, recipe: Recipe, *, allowed: int | float, say: Say
    ) -> None:
        self.path, self.dataset, self.recipe = path, dataset, recipe
        self.allowed, self.say = allowed, say
        self.dtype = np.dtype(recipe.feature_dtype).newbyteorder("<")
        self.partial = PartialCache(
            partial_folder(path), recipe.fingerprint, recipe.backbone.num_features, self.dtype
        )
        self.inventory = Inventory(dataset, self._num_views)
        self.failures: list[Failure] = []
        self.planned = Counter((s.split, s.target) for s in dataset.samples)
        self.engine: Engine | None = None
        self.provenance: dict[str, Any] = {}
        self.images_per_second: float | None = None
        self._old_parity: list[float] = []
        self._failed = Counter[tuple[str, int]]()
        self.intake = Intake(self.partial, self.inventory, self.dtype, self._count_failure)

    def find_known(
        self, old: Cache | None, device: torch.device, *, precision: str, rebuild: bool,
        rehash: bool,
    ) -> list[int]:  # fmt: skip
        """Collect what an older cache and an unfinished run know.

        Returns:
            Positions of the images whose content may be known: see ``Inventory.match``.

        Raises:
            CacheError: If the unfinished run is one of another recipe, precision or kind of device,
                and ``rebuild`` is not set.
        """
        try:
            self.partial.open()
            self._check_unfinished(precision, device)
        except CacheError:
            if not rebuild:
                raise
            self.partial.clear()
        if old is not None:
            self.provenance = dict(old.provenance)
            self._old_parity = old.parity
            self.inventory.adopt(old)
        resumed = sum(self.inventory.resume(*shard) for shard in self.partial.read_shards())
        if resumed:
            self.provenance = self.partial.provenance or self.provenance
            self.say(f"Resuming {self.path.name}: {resumed:,} images are done.")
        return self.inventory.match(rehash=rehash)

    @property
    def pending(self) -> list[Sample]:
        """The images that have no features yet."""
        samples = self.dataset.samples
        return [s for position, s in enumerate(samples) if self.inventory.is_pending(position)]

    def _num_views(self, split: str) -> int:
        return self.recipe.view_rules.for_split(split, self.dataset.splits).num_views

    def _check_unfinished(self, precision: str, device: torch.device) -> None:
        fixed = self.partial.engine
        if fixed and (fixed.precision, fixed.device_type) != (precision, device.type):
            raise CacheError(
                "unfinished extraction", expected=f"{fixed.precision} on {fixed.device_type}",
                found=f"{precision} on {device.type}", where=self.partial.folder,
                hint="Finish it with the same --precision and --device, or pass --rebuild",
            )  # fmt: skip

    def choose_engine(
        self, device: torch.device, *, precision: str, batch_size: int | str, name: str
    ) -> None:
        """Build the engine; the choices of the rows that are there already stand.

        Raises:
            CacheError: If those were made by batches that do not fit the memory here.
        """
        fixed, made = self.partial.engine, _engine_facts(self.provenance)
        as_made = made is not None and (made.device_type, made.precision) == (
            device.type, precision,
        )  # fmt: skip
        as_before = fixed or (made if as_made else None)
        if as_before:
            name, batch_size = as_before.engine, as_before.batch_size
            torch.set_num_threads(as_before.num_threads)
        with self.partial.probing():
            probes = decode_probes(
                self.dataset, self.dataset.samples, self.recipe.rules,
                isolate=self.partial.was_killed,
            )  # fmt: skip
        # Chosen by the number of images, not of views: view 0 equals a cache without views.
        engine = build_engine(
            self.recipe.backbone, device, probes, precision=precision, batch_size=batch_size,
            name=name, num_images=len(self.dataset.samples),
        )  # fmt: skip
        if as_before and engine.batch_size == as_before.batch_size:
            engine = replace(engine, reason="as for the rows that are there")
        if fixed and engine.batch_size != fixed.batch_size:
            raise CacheError(
                "unfinished extraction", expected=f"memory for batches of {fixed.batch_size}",
                found=f"{engine.batch_size} at most", where=self.partial.folder,
                hint="Finish it on the device it was begun on, or pass --rebuild",
            )  # fmt: skip
        self.engine = engine
        self.check_frozen()
        self._note_engine(engine)

    def _note_engine(self, engine: Engine) -> None:
        """Say which engine it is, and note it for resuming and for provenance."""
        against = "no readable image to check it with"
        if engine.parity:
            worst, number = max(engine.parity), len(engine.parity)
            against = f"within {worst:.1e} of the eager fp32 network on {number} images"
        self.say(
            f"Engine: {self.recipe.backbone.name} by {engine.name} {engine.precision} on "
            f"{engine.device} ({engine.reason}), {engine.concurrency} x {engine.batch_size} images "
            f"at once, {against}."
        )
        warn_of_update(self.path.name, self.provenance, self._old_parity, engine)
        self.provenance = extend_provenance(
            self.provenance, self._old_parity, engine, self.recipe.backbone.weights_source
        )
        self.partial.start(
            EngineFacts(
                engine.name, engine.precision, engine.batch_size, torch.get_num_threads(),
                engine.device.type,
            ),
            self.provenance,
        )  # fmt: skip

    def flush(self, timer: Timer, at_least: int = 1) -> None:
        """Write a shard of the rows at hand, if they are so many.

        Hashing what runs takes 20 ms for B0, and nothing where it is exported (ONNX).

        Raises:
            BackboneError: If the network has changed: nobody can tell which rows are true.
        """
        assert self.engine is not None
        if len(self.intake) >= at_least and not self.engine.is_frozen():
            raise self._drop_rows()
        self.intake.flush(timer, at_least)

    def make_lane(self, *, alone: bool) -> Lane:
        """Return what this cache wants of the pipeline; ``alone`` it gets what it wants only."""
        assert self.engine is not None
        pending = None if alone else frozenset(self.pending)
        return Lane(self.recipe, self.engine, pending, self.inventory.claim)

    @property
    def rows_per_shard(self) -> int:
        """Rows that fill a shard, at least a batch."""
        assert self.engine is not None
        row_bytes = self.recipe.backbone.num_features * self.dtype.itemsize
        row_bytes *= self.recipe.view_rules.num_views
        return max(self.engine.batch_size, min(SHARD_ROWS, SHARD_BYTES // row_bytes))

    def describe_kept(self) -> str:
        """Say how far an interrupted run got."""
        num_images = len(self.dataset.samples)
        num_kept = num_images - len(self.pending)
        return f"{num_kept:,} of {num_images:,} images are kept in {printable(self.partial.folder)}"

    def note_speed(self, seconds: float, timer: Timer) -> None:
        """Record how fast it went."""
        self.images_per_second = round(self.intake.num_new / seconds, 2)
        self.provenance |= {
            "images_per_second": self.images_per_second,
            "stage_seconds": {k: round(v, 3) for k, v in sorted(timer.seconds.items())},
            "bottleneck": find_bottleneck(timer.seconds),
        }

    def check_frozen(self) -> None:
        """Check that the backbone, and the copy of it that runs, are what they were.

        Raises:
            BackboneError: If not; the rows that it made are dropped.
        """
        assert self.engine is not None
        backbone = self.recipe.backbone
        if state_sha256(backbone.network) != backbone.weights_sha256 or not self.engine.is_frozen():
            raise self._drop_rows()

    def _drop_rows(self) -> BackboneError:
        """Drop the rows of a network that is not frozen; return what to raise."""
        self.partial.clear()
        backbone = self.recipe.backbone
        return BackboneError(
            "frozen backbone", expected=f"state {backbone.weights_sha256[:16]}...",
            found="another one after a forward pass", where=backbone.name,
            hint="Its forward pass changes its own state: make it stateless in eval mode",
        )  # fmt: skip

    def _count_failure(self, s: Sample, reason: str) -> None:
        self.failures.append(Failure(s.path, s.split, s.target, reason, s.image_bytes, s.mtime_ns))
        self._failed[s.split, s.target] += 1
        failed = self._failed[s.split, s.target]
        planned = self.planned[s.split, s.target]
        if failed > _allowed_failures(self.allowed, planned):
            where = "/".join([s.split, *([self._class(s.target)] if s.target >= 0 else [])])
            limit = f"{self.allowed:.0%}" if isinstance(self.allowed, float) else self.allowed
            raise DataError(
                "images", expected=f"at most {limit} of {planned} failed in {where}",
                found=f"{failed}, the last being {s.path}: {reason}",
                hint="Mend them or allow more with --max-errors; the same command then goes on",
            )  # fmt: skip

    def _class(self, target: int) -> str:
        return self.dataset.classes[target]

    def finish(self) -> Cache:
        """Write the cache from all known rows, whole or not at all; then drop the shards."""
        splits: dict[str, SplitRows] = {}
        truncated: list[str] = []
        for name in self.dataset.splits:
            samples, numbers = self.inventory.rows_of(name)
            is_truncated = self.inventory.contents.is_truncated
            truncated += [s.path for s, n in zip(samples, numbers, strict=True) if is_truncated(n)]
            self._refuse_empty(name, samples)
            splits[name] = self._split_rows(samples, numbers, self._num_views(name))
        remove_temporaries(self.path)  # of a run killed while writing: the lock is ours now
        cache = write_rows(
            self.path, splits, identity=self.recipe.identity,
            provenance={**self.provenance, "truncated": truncated},
            classes=self.dataset.classes, task="multiclass", failures=self.failures,
        )  # fmt: skip
        self.partial.remove()
        return cache

    def abandon(self) -> None:
        """Leave nothing behind when nothing was gained; what was extracted stays for resuming."""
        if self.partial.is_worthless:
            self.partial.remove()
        elif self.partial.is_running:
            self.partial.stop()

    def _refuse_empty(self, split: str, samples: Sequence[Sample]) -> None:
        left = {sample.target for sample in samples}
        for (name, target), planned in self.planned.items():
            if name == split and target not in left:
                label = self._class(target) if target >= 0 else "images"
                raise DataError(
                    f"{split}/{label}", expected="at least one readable image",
                    found=f"none of {planned}", hint="Mend the images named above",
                )  # fmt: skip

    def _split_rows(
        self, samples: list[Sample], numbers: npt.NDArray[np.int64], num_views: int
    ) -> SplitRows:
        views, contents = () if num_views == 1 else (num_views,), self.inventory.contents
        grouped = bool(samples) and samples[0].group is not None
        return SplitRows(
            shape=(len(samples), *views, self.recipe.backbone.num_features),
            dtype=self.dtype,
            feature_blocks=lambda: contents.blocks(numbers, num_views),
            targets=np.array([s.target for s in samples], np.int64),
            paths=[s.path for s in samples],
            groups=[str(s.group) for s in samples] if grouped else None,
            image_sha256=contents.sha256(numbers),
            image_bytes=np.array([s.image_bytes for s in samples], np.int64),
            mtime_ns=np.array([s.mtime_ns for s in samples], np.int64),
        )


def _engine_facts(provenance: Mapping[str, Any]) -> EngineFacts | None:
    """Return how rows were made, None where a cache does not say it all."""
    kinds = {field.name: field.type for field in fields(EngineFacts)}
    values: dict[str, Any] = {name: provenance.get(name) for name in kinds}
    fits = all(type(values[name]).__name__ == kind for name, kind in kinds.items())
    return EngineFacts(**values) if fits else None


def produce(works: Sequence[Production], workers: int | str, *, progress: bool) -> None:
    """Extract what is pending for some caches of the same images, each image decoded once.

    What is in a shard survives any end; the rows at hand are put into one when it comes.

    Args:
        works: Productions over one data set, each with its engine chosen.
        workers: Decoding threads, or ``auto``.
        progress: Show a progress bar on standard error when that is a terminal.
    """
    timer, begin = Timer(), time.perf_counter()
    lanes = [work.make_lane(alone=len(works) == 1) for work in works]
    samples = works[0].dataset.samples
    pending = array("l", (
        position for position in range(len(samples))
        if any(work.inventory.is_pending(position) for work in works)
    ))  # fmt: skip
    again = False
    try:
        with contextlib.ExitStack() as stack:
            check_signals = stack.enter_context(held_signals())
            for work in works:  # also when interrupted, and whatever becomes of the others
                stack.callback(work.partial.stop)
                stack.callback(work.flush, timer)
            while pending:
                streamed = iter(pending)
                for batch in _stream_pending(
                    works, lanes, pending, workers, timer, progress=progress, again=again
                ):
                    positions = list(islice(streamed, len(batch.outcomes)))
                    for number, (work, lane) in enumerate(zip(works, lanes, strict=True)):
                        _take(work, lane, number, positions, batch)
                        work.flush(timer, at_least=work.rows_per_shard)
                    check_signals()
                unsettled = [work.intake.pop_unsettled() for work in works]
                lanes = [
                    replace(lane, pending=frozenset(samples[position] for position in own))
                    for lane, own in zip(lanes, unsettled, strict=True)
                ]
                pending, again = array("l", sorted(set().union(*unsettled))), True
            for work in works:
                work.intake.close()
    except Interrupted as stop:
        kept = "; ".join(work.describe_kept() for work in works)
        message = f"interrupted: {kept}; the same command goes on"
        raise Interrupted(stop.signal_number, message) from None
    for work in works:
        work.note_speed(time.perf_counter() - begin, timer)
        work.check_frozen()


def _take(
    work: Production, lane: Lane, number: int, positions: Sequence[int], batch: FeatureBatch
) -> None:
    """Hand a cache what it wants of a batch, being lane ``number``."""
    rows = zip(positions, batch.outcomes, batch.features[number], strict=True)
    for position, outcome, features in rows:
        if lane.wants(outcome.sample):
            work.intake.take(position, outcome, features, claimed=outcome.claims[number])


def _stream_pending(
    works: Sequence[Production], lanes: Sequence[Lane], pending: Sequence[int], workers: int | str,
    timer: Timer, *, progress: bool, again: bool,
) -> Iterator[FeatureBatch]:  # fmt: skip
    """Stream the pending images; those that a killed run may have died of decode isolated.

    So do those that run ``again``, since a twin of theirs had an accident.
    """
    dataset = works[0].dataset
    first = len(pending) if again else 0
    if not again and any(work.partial.was_killed for work in works):
        first = max(work.rows_per_shard for work in works) + images_under_way(lanes)
    bar = tqdm(
        total=len(pending), unit="img", desc="extract", smoothing=0.1, dynamic_ncols=True,
        disable=None if progress else True,
    )  # fmt: skip
    with bar:
        for part, isolate in ((pending[:first], True), (pending[first:], False)):
            samples = [dataset.samples[position] for position in part]
            for batch in stream_features(
                dataset, samples, lanes, workers=workers, timer=timer, isolate=isolate
            ):
                yield batch
                bar.set_postfix_str(f"waits for {find_bottleneck(timer.seconds)}", refresh=False)
                bar.update(len(batch.outcomes))


def _allowed_failures(allowed: int | float, planned: int) -> int:
    """A share allows at least one image: 5 % of ten is not none."""
    return (
        max(1, int(allowed * planned)) if isinstance(allowed, float) and allowed else int(allowed)
    )


# What ``select`` and ``verify --repair`` said of the rows holds also after an update.
_KEPT_FACTS = ("selected_from", "origins", "lost")


def warn_of_update(
    name: str, provenance: Mapping[str, Any], parity: Sequence[float], engine: Engine
) -> None:
    """Warn where an engine adds rows to those of another precision, or of one that is lost.

    Another precision is no other identity, but whoever mixes them should know.

    Args:
        name: Of the cache.
        provenance: Of the rows that are there.
        parity: Of the engine that made them.
        engine: What makes the new ones.
    """
    made = provenance.get("precision", engine.precision)
    if "lost" in provenance:
        old = "nobody knows how its rows were made, since its provenance was damaged"
        new = engine.precision
    elif made != engine.precision:
        pairs = ((made, parity), (engine.precision, engine.parity))
        old, new = (f"{p} (within {max(e, default=0):.1e})" for p, e in pairs)
        old = f"its rows were made at {old} of the eager fp32 network"
    else:
        return
    text = f"{name}: {old}, new ones will be at {new}"
    warnings.warn(text, FeatcacheWarning, stacklevel=4)


def extend_provenance(
    provenance: Mapping[str, Any], parity: Sequence[float], engine: Engine, weights_source: str
) -> dict[str, Any]:
    """Return how the rows were made when an engine has added its own: arguments as above."""
    precisions = {engine.precision, str(provenance.get("precision"))}
    return {
        **{key: provenance[key] for key in _KEPT_FACTS if key in provenance},
        **environment_facts(engine.device), "device_type": engine.device.type,
        "weights_source": weights_source, "engine": engine.name,
        "engine_reason": engine.reason, "concurrency": engine.concurrency,
        # of rows of two precisions, the one whose bound holds for all
        "precision": max(precisions & PARITY_BOUNDS.keys(), key=PARITY_BOUNDS.__getitem__),
        "batch_size": engine.batch_size,
        # of older engines the worst: an update a night would else add to it for ever
        "parity": [*sorted(parity)[-MAX_PARITY:], *engine.parity],
    }  # fmt: skip
