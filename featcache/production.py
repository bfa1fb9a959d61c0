"""Produce a cache: known rows and pending images -> shards -> one file.

Reads: images. Writes: ``CACHE.partial/`` while working, then ``CACHE``.
"""

from __future__ import annotations

import contextlib
import glob
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from featcache.backbone import state_sha256
from featcache.cache import Cache, Failure
from featcache.cache_writer import SplitRows, write_rows
from featcache.dataset import ImageDataset, Sample
from featcache.engine import Engine, build_engine
from featcache.errors import BackboneError, CacheError, DataError
from featcache.pipeline import (
    FeatureBatch,
    Lane,
    Outcome,
    find_bottleneck,
    images_under_way,
    stream_features,
)
from featcache.recipe import Recipe, decode_probes
from featcache.runtime import Say, Timer, environment_facts
from featcache.shards import (
    SHARD_BYTES,
    SHARD_ROWS,
    EngineFacts,
    KnownRows,
    PartialCache,
    Row,
    partial_folder,
)


class Production:
    """One extraction under way: find what is known, run the rest, write the cache.

    Use it while holding the lock of ``folder``, in this order: ``find_known``, then, if anything is
    ``pending``, ``choose_engine`` and ``produce``, then ``finish``.

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
        self.known = KnownRows()
        self.pending: list[Sample] = []
        self.failures: list[Failure] = []
        self.planned = Counter((s.split, s.target) for s in dataset.samples)
        self.engine: Engine | None = None
        self.provenance: dict[str, Any] = {}
        self.num_new = 0
        self.images_per_second: float | None = None
        self._old_parity: list[float] = []
        self._failed = Counter[tuple[str, int]]()
        # Done, but not in a shard yet; pairs, so that no interruption can part them.
        self._rows: list[tuple[Outcome, npt.NDArray[Any]]] = []

    def find_known(
        self, old: Cache | None, device: torch.device, *, precision: str, rebuild: bool
    ) -> None:
        """Collect what an older cache and an unfinished run know; the rest is pending.

        Raises:
            CacheError: If the unfinished run is one of another recipe, precision or kind of device,
                and ``rebuild`` is not set.
        """
        if old is not None:
            self._adopt(old)
        resumed = 0
        try:
            resumed = self.partial.resume(self.known)
            self._check_unfinished(precision, device)
        except CacheError:
            if not rebuild:
                raise
            self.partial.clear()
            self.known, resumed = KnownRows(), 0
        self.pending = [s for s in self.dataset.samples if self._find(s) is None]
        if resumed:
            self.provenance = self.provenance or self.partial.provenance
            self.say(
                f"Resuming {self.path.name}: {resumed:,} images done, {len(self.pending):,} to go."
            )

    def _num_views(self, split: str) -> int:
        return self.recipe.view_rules.for_split(split, self.dataset.splits).num_views

    def _find(self, sample: Sample) -> Row | None:
        return self.known.find(sample, self._num_views(sample.split))

    def _adopt(self, old: Cache) -> None:
        """Take over the rows of an older cache, and how they were made."""
        truncated = set(old.provenance.get("truncated", []))
        self.provenance = dict(old.provenance)
        self._old_parity = list(old.provenance.get("parity", []))
        for split in old.splits.values():
            keys = zip(split.paths, split.image_bytes, split.mtime_ns, strict=True)
            self.known.add(
                split.features.reshape(-1, old.num_features),
                [split.num_views] * len(split),
                [(path, int(size), int(mtime)) for path, size, mtime in keys],
                [row.tobytes() for row in split.image_sha256],
                [path in truncated for path in split.paths],
            )

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
            CacheError: If those were made at another precision.
        """
        fixed, made = self.partial.engine, self.provenance
        if made.get("precision", precision) != precision:
            raise CacheError(
                "update of the cache", expected=f"--precision {made['precision']}, as its rows",
                found=precision, where=self.path, hint="Use the same, or pass --rebuild",
            )  # fmt: skip
        if fixed:
            name, batch_size = fixed.engine, fixed.batch_size
            torch.set_num_threads(fixed.num_threads)
        elif made.get("device_type") == device.type:
            name, batch_size = str(made["engine"]), int(made["batch_size"])
            torch.set_num_threads(int(made["num_threads"]))
        probes = decode_probes(
            self.dataset, self.dataset.samples, self.recipe.rules, isolate=self.partial.was_killed
        )
        # Chosen by the number of images, not of views: view 0 equals a cache without views.
        engine = build_engine(
            self.recipe.backbone, device, probes, precision=precision, batch_size=batch_size,
            name=name, num_images=len(self.dataset.samples),
        )  # fmt: skip
        if fixed or made.get("device_type") == device.type:
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
        self.provenance = {
            **environment_facts(engine.device), "device_type": engine.device.type,
            "weights_source": self.recipe.backbone.weights_source, "engine": engine.name,
            "engine_reason": engine.reason, "concurrency": engine.concurrency,
            "precision": engine.precision, "batch_size": engine.batch_size,
            "parity": [*self._old_parity, *engine.parity],
        }  # fmt: skip
        self.partial.start(
            EngineFacts(
                engine.name, engine.precision, engine.batch_size, torch.get_num_threads(),
                engine.device.type,
            ),
            self.provenance,
        )  # fmt: skip

    @property
    def lane(self) -> Lane:
        """What this cache wants of the pipeline."""
        assert self.engine is not None
        return Lane(self.recipe, self.engine, frozenset(self.pending))

    @property
    def rows_per_shard(self) -> int:
        """Rows that fill a shard, at least a batch."""
        assert self.engine is not None
        row_bytes = self.recipe.backbone.num_features * self.dtype.itemsize
        row_bytes *= self.recipe.view_rules.num_views
        return max(self.engine.batch_size, min(SHARD_ROWS, SHARD_BYTES // row_bytes))

    def take(
        self, outcomes: Sequence[Outcome], features: Sequence[npt.NDArray[np.float32] | None],
        timer: Timer,
    ) -> None:  # fmt: skip
        """Keep what the pipeline made of some images; whole shards go to the disk.

        Args:
            outcomes: Of images that this cache wants.
            features: (V, D) of each, None where it failed.
            timer: Adds up ``write``.

        Raises:
            DataError: If more images have failed than are allowed.
            BackboneError: If features are not finite in the stored dtype.
        """
        for outcome, rows in zip(outcomes, features, strict=True):
            if rows is not None:
                self._rows.append((outcome, self._stored(rows, outcome)))
            else:
                self._count_failure(outcome)
        if len(self._rows) >= self.rows_per_shard:
            self.flush(timer)

    def flush(self, timer: Timer) -> None:
        """Write the rows that are in no shard yet into one."""
        if not self._rows:
            return
        facts = [
            {
                "path": r.sample.path, "image_bytes": r.sample.image_bytes,
                "mtime_ns": r.sample.mtime_ns, "image_sha256": r.sha256.hex(),
                "truncated": r.truncated, "views": self._num_views(r.sample.split),
            }
            for r, _ in self._rows
        ]  # fmt: skip
        with timer("write"):
            self.partial.add_shard(np.concatenate([f for _, f in self._rows]), facts, self.known)
        self.num_new += len(self._rows)
        self._rows.clear()

    def note_speed(self, seconds: float, timer: Timer) -> None:
        """Record how fast it went."""
        self.images_per_second = round(self.num_new / seconds, 2)
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
            self.partial.clear()
            raise BackboneError(
                "frozen backbone", expected=f"state {backbone.weights_sha256[:16]}...",
                found="another one after a forward pass", where=backbone.name,
                hint="Its forward pass changes its own state: make it stateless in eval mode",
            )  # fmt: skip

    def _stored(self, features: npt.NDArray[np.float32], outcome: Outcome) -> npt.NDArray[Any]:
        """Return features in the stored dtype, all finite."""
        with np.errstate(over="ignore"):
            stored = features.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise BackboneError(
                "features", expected=f"finite {self.dtype.name} values", found="NaN or infinity",
                where=outcome.sample.path,
                hint="Use --precision fp32 and --feature-dtype float32",
            )  # fmt: skip
        return stored

    def _count_failure(self, outcome: Outcome) -> None:
        s, reason = outcome.sample, str(outcome.reason)
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
            found = [(s, row) for s in self.dataset.split(name) if (row := self._find(s))]
            samples, rows = [s for s, _ in found], [row for _, row in found]
            truncated += [s.path for s, row in found if row.truncated]
            self._refuse_empty(name, samples)
            splits[name] = self._split_rows(samples, rows, self._num_views(name))
        for stale in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp"):
            stale.unlink(missing_ok=True)  # of a run killed while writing: the lock is ours now
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

    def _split_rows(self, samples: list[Sample], rows: list[Row], num_views: int) -> SplitRows:
        views = () if num_views == 1 else (num_views,)
        grouped = bool(samples) and samples[0].group is not None
        return SplitRows(
            shape=(len(rows), *views, self.recipe.backbone.num_features),
            dtype=self.dtype,
            feature_blocks=lambda: self.known.blocks(rows, num_views),
            targets=np.array([s.target for s in samples], np.int64),
            paths=[s.path for s in samples],
            groups=[str(s.group) for s in samples] if grouped else None,
            image_sha256=np.frombuffer(b"".join(r.sha256 for r in rows), np.uint8).reshape(-1, 32),
            image_bytes=np.array([s.image_bytes for s in samples], np.int64),
            mtime_ns=np.array([s.mtime_ns for s in samples], np.int64),
        )


def produce(works: Sequence[Production], workers: int | str, *, progress: bool) -> None:
    """Extract what is pending for some caches of the same images, each image decoded once.

    What is in a shard survives any end; the rows at hand are put into one when it comes.

    Args:
        works: Productions over one data set, each with its engine chosen.
        workers: Decoding threads, or ``auto``.
        progress: Show a progress bar on standard error when that is a terminal.
    """
    timer, begin = Timer(), time.perf_counter()
    lanes = [work.lane for work in works]
    with contextlib.ExitStack() as stack:
        for work in works:  # also when interrupted, and whatever becomes of the others
            stack.callback(work.partial.stop)
            stack.callback(work.flush, timer)
        for batch in _stream_pending(works, lanes, workers, timer, progress=progress):
            for work, lane, features in zip(works, lanes, batch.features, strict=True):
                both = zip(batch.outcomes, features, strict=True)
                wanted = [(o, f) for o, f in both if o.sample in lane.pending]
                work.take([o for o, _ in wanted], [f for _, f in wanted], timer)
    for work in works:
        work.note_speed(time.perf_counter() - begin, timer)
        work.check_frozen()


def _stream_pending(
    works: Sequence[Production], lanes: Sequence[Lane], workers: int | str, timer: Timer, *,
    progress: bool,
) -> Iterator[FeatureBatch]:  # fmt: skip
    """Stream the pending images; those that a killed run may have died of decode isolated."""
    dataset = works[0].dataset
    pending = [s for s in dataset.samples if any(s in lane.pending for lane in lanes)]
    first = 0
    if any(work.partial.was_killed for work in works):
        first = max(work.rows_per_shard for work in works) + images_under_way(lanes)
    bar = tqdm(
        total=len(pending), unit="img", desc="extract", smoothing=0.1, dynamic_ncols=True,
        disable=None if progress else True,
    )  # fmt: skip
    with bar:
        for part, isolate in ((pending[:first], True), (pending[first:], False)):
            for batch in stream_features(
                dataset, part, lanes, workers=workers, timer=timer, isolate=isolate
            ):
                yield batch
                bar.set_postfix_str(f"waits for {find_bottleneck(timer.seconds)}", refresh=False)
                bar.update(len(batch.outcomes))


def _allowed_failures(allowed: int | float, planned: int) -> int:
    """A share allows at least one image: 5 % of ten is not none."""
    return (
        max(1, int(allowed * planned)) if isinstance(allowed, float) and allowed else int(allowed)
    )
