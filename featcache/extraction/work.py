"""Work: run the images that are left, and write their features into shards.

Reads: images. Writes: ``CACHE.partial/``.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.workers import read_workers, with_worker
from featcache.data.dataset import ImageDataset, Sample
from featcache.errors import BackboneError, printable
from featcache.extraction.engine_choice import check_frozen, drop_rows
from featcache.extraction.pipeline import (
    FeatureBatch,
    Lane,
    find_bottleneck,
    images_under_way,
    stream_features,
    vectors_under_way,
)
from featcache.extraction.plan import Job, Work
from featcache.extraction.shards import write_shard
from featcache.extraction.view_stream import Outcome
from featcache.formatting import count
from featcache.progress import Progress
from featcache.runtime import Interrupted, Timer, device_name, held_signals

SHARD_BYTES = 16 << 20
SHARD_ROWS = 4096
"""No shard has more, however narrow the features: rows wait in memory until their shard is full."""


def most_unlisted(lanes: Sequence[Lane]) -> list[int]:
    """Return how many vectors of each cache are run and not listed at most: a death loses these.

    As many as a shard may have; of batches so large that more are under way, so many.

    Args:
        lanes: Of all caches that are made together.
    """
    sizes = [
        lane.recipe.backbone.num_features * np.dtype(lane.recipe.feature_dtype).itemsize
        for lane in lanes
    ]
    ahead = vectors_under_way(lanes)
    return [max(ahead, min(SHARD_ROWS, SHARD_BYTES // size)) for size in sizes]


def vectors_per_shard(lanes: Sequence[Lane], most: Sequence[int] | None = None) -> list[int]:
    """Return how many vectors fill a shard of each cache: with what is under way, the most.

    A writer waits until its shard is listed. Meanwhile the network runs what is under way, so that
    it need not wait: 512 to 2,048 images on a GPU, which take 0.1 to 0.4 s at 5,000 a second. A
    shard of 16 MiB was synced here in 17 ms, a manifest in 3 to 18.

    Args:
        lanes: Of all caches that are made together.
        most: How many are run and not listed at most. Default: ``most_unlisted``.
    """
    ahead = vectors_under_way(lanes)
    return [max(ahead, m) + 1 - ahead for m in (most_unlisted(lanes) if most is None else most)]


class ShardWriter:
    """Collects the rows of one cache until they fill a shard, and writes it.

    Args:
        job: The cache, its engine chosen.
        timer: Adds up the seconds of ``write``.
        num_vectors: How many fill a shard: see ``vectors_per_shard``.
    """

    def __init__(self, job: Work, timer: Timer, num_vectors: int) -> None:
        assert job.engine is not None
        self._job, self._engine, self._timer = job, job.engine, timer
        # Position and features (V, D); None where they are those of the same content elsewhere.
        self._rows: list[tuple[int, npt.NDArray[Any] | None]] = []
        self._most, self._num_vectors = num_vectors, 0  # of the rows; one without any is one too

    def take(
        self, outcomes: Sequence[Outcome], features: Sequence[npt.NDArray[np.float32] | None]
    ) -> None:
        """Take over what the pipeline made of images, unless this cache already has their features.

        Raises:
            DataError: If more images have failed than are allowed.
            BackboneError: If features are not finite in the stored dtype, or the network has
                changed.
        """
        ledger = self._job.ledger
        for outcome, made in zip(outcomes, features, strict=True):
            if ledger.wants(outcome.position):
                stored = None if made is None else self._stored(made, outcome)
                if ledger.settle(outcome):
                    self._rows.append((outcome.position, stored))
                    self._num_vectors += 1 if stored is None else len(stored)
        repeated = [(position, None) for position in ledger.settle_repeated()]
        self._rows += repeated
        self._num_vectors += len(repeated)
        if self._num_vectors >= self._most:
            self.flush()

    def _stored(self, features: npt.NDArray[np.float32], outcome: Outcome) -> npt.NDArray[Any]:
        """Return features in the stored dtype, all finite."""
        dtype = self._job.dtype
        with np.errstate(over="ignore"):
            stored = features.astype(dtype)
        if not np.isfinite(stored).all():
            raise BackboneError(
                "features", expected=f"finite {dtype.name} values", found="NaN or infinity",
                where=outcome.sample.path,
                hint="Use --precision fp32 and --feature-dtype float32",
            )  # fmt: skip
        return stored

    def flush(self) -> None:
        """Write the rows at hand, if there are any, into a shard; return when it is listed.

        Hashing what runs takes 20 ms for B0, and nothing where it is exported (ONNX).

        Raises:
            BackboneError: If the network has changed: nobody can tell which rows are true.
        """
        if not self._rows:
            return
        if not self._engine.is_frozen():
            raise drop_rows(self._job)
        job, ledger = self._job, self._job.ledger
        own = [(position, made) for position, made in self._rows if made is not None]
        none = np.empty((0, job.recipe.backbone.num_features), job.dtype)
        vectors = np.concatenate([none, *(made for _, made in own)])
        table = [
            ledger.describe_row(position, 0 if made is None else len(made))
            for position, made in self._rows
        ]
        with self._timer("write"):
            # Any process may write a shard; only the one with the lock writes the manifest.
            receipt = write_shard(job.partial.next_shard, vectors, table)
            stored = job.list_shard(receipt, [position for position, _ in self._rows], table)
        self._rows, self._num_vectors = [], 0  # listed: an interruption must not write them again
        ledger.store(stored, (position for position, _ in own))


class Patience:
    """How long to wait for batches under way, by how long they have taken.

    Many networks take less than a second a batch, some a minute: SIGTERM lets each finish its
    batch, as what is in hand is a shard, which may be an hour's work. A queue gives two minutes.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        """Seconds between two batches."""
        self._last = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last batch."""
        return time.monotonic() - self._last

    def note(self) -> None:
        """Take note of a batch that is done."""
        self.longest, self._last = max(self.longest, self.silence), time.monotonic()

    def begin(self) -> None:
        """Measure from now on: no batch was under way."""
        self._last = time.monotonic()

    def seconds(self) -> float:
        """Return how long it may take until what is in hand is in a shard."""
        return min(_LEAST_PATIENCE + 3 * max(self.longest, self.silence), _MOST_PATIENCE)


_LEAST_PATIENCE, _MOST_PATIENCE = 7.0, 100.0


def work(jobs: Sequence[Job], positions: Sequence[int]) -> None:
    """Make the features that some caches of one data set still want, each image decoded once.

    What is in a shard survives any end; the rows at hand are put into one when it comes.

    Args:
        jobs: The caches, each with its engine chosen.
        positions: The images to be run.

    Raises:
        Interrupted: If a signal asked for the end; it says how far it got.
        FeatcacheError: If an image, the network or the disk does not allow to go on.
    """
    timer, begin, num_images = Timer(), time.perf_counter(), 0
    lanes, patience = lanes_of(jobs), Patience()
    sizes = vectors_per_shard(lanes)
    writers = [ShardWriter(job, timer, size) for job, size in zip(jobs, sizes, strict=True)]

    def stream(part: Sequence[int], num_isolated: int) -> Iterator[FeatureBatch]:
        nonlocal num_images
        for batch in _stream(jobs, part, num_isolated, timer):
            patience.note()
            num_images += len(batch.outcomes)
            yield batch

    def note_own_work(job: Job) -> None:
        """Say who worked, where that is not the only process that did."""
        if job.partial.part or read_workers(job.provenance):
            assert job.engine is not None
            note_worker(
                job, socket.gethostname(), device_name(job.engine.device), processes=1,
                images=num_images, seconds=time.perf_counter() - begin,
            )  # fmt: skip

    # If an earlier run was killed, one of the next images may have killed it: they are decoded in a
    # child process.
    num_isolated = 0
    if any(job.partial.was_killed for job in jobs):
        num_isolated = max(sizes) + images_under_way(lanes)
    try:
        with contextlib.ExitStack() as stack:
            check_signals = stack.enter_context(held_signals(patience.seconds))
            for job, writer in zip(jobs, writers, strict=True):
                # also when interrupted, and whatever becomes of the others
                stack.callback(job.partial.stop)
                stack.callback(note_own_work, job)
                stack.callback(writer.flush)
            run_images(
                jobs, writers, stream, positions, num_isolated=num_isolated, check=check_signals
            )
    except Interrupted as stop:
        kept = "; ".join(map(describe_kept, jobs))
        message = f"interrupted: {kept}; the same command goes on"
        raise Interrupted(stop.signal_number, message) from None
    for job in jobs:
        note_speed(job, time.perf_counter() - begin, timer.seconds)
        check_frozen(job)


def run_images(
    works: Sequence[Work], writers: Sequence[ShardWriter],
    stream: Callable[[Sequence[int], int], Iterator[FeatureBatch]], positions: Sequence[int], *,
    num_isolated: int, check: Callable[[], object],
) -> None:  # fmt: skip
    """Take over the features of images, batch by batch, until none of them is left.

    Args:
        works: The caches.
        writers: Of each.
        stream: Runs some positions, so many of them decoded in a child process.
        positions: The images.
        num_isolated: So many of the first are decoded in a child process.
        check: Called after each batch; may raise.
    """
    while positions:
        for batch in stream(positions, num_isolated):
            for number, writer in enumerate(writers):
                writer.take(batch.outcomes, batch.features[number])
            check()
        positions = sorted(set[int]().union(*(work.ledger.take_unsettled() for work in works)))
        # An identical file failed for a reason of its own, such as being changed while it was
        # read: these are tried now, in a child process.
        num_isolated = len(positions)


def lanes_of(works: Sequence[Work]) -> list[Lane]:
    """Return what the pipeline makes of each image: the features of each cache."""
    lanes = []
    for work in works:
        assert work.engine is not None
        lanes.append(Lane(work.recipe, work.engine, work.ledger.claim))
    return lanes


def stream_parts(
    works: Sequence[Work], dataset: ImageDataset, samples: Sequence[Sample],
    positions: Sequence[int], num_isolated: int, *, workers: int | str, timer: Timer,
) -> Iterator[FeatureBatch]:  # fmt: skip
    """Run images through the networks, the first ``num_isolated`` decoded in a child process."""
    for part, isolate in ((positions[:num_isolated], True), (positions[num_isolated:], False)):
        yield from stream_features(
            dataset, samples, lanes_of(works), positions=part, workers=workers, timer=timer,
            isolate=isolate,
        )  # fmt: skip


def _stream(
    jobs: Sequence[Job], positions: Sequence[int], num_isolated: int, timer: Timer
) -> Iterator[FeatureBatch]:
    """Do what ``stream_parts`` does, and show how far it is."""
    dataset, options = jobs[0].dataset, jobs[0].options
    with Progress("extract", "image", len(positions), shown=options.progress) as progress:
        for batch in stream_parts(
            jobs,
            dataset,
            dataset.samples,
            positions,
            num_isolated,
            workers=options.workers,
            timer=timer,
        ):
            yield batch
            bottleneck = find_bottleneck(timer.seconds)
            progress.move_by(len(batch.outcomes), f"waits for {bottleneck}")


def describe_kept(job: Job) -> str:
    """Say how far an interrupted run got."""
    num_kept, num_images = job.ledger.num_kept, len(job.dataset.samples)
    return f"{num_kept:,} of {count(num_images, 'image')} kept in {printable(job.partial.folder)}"


def note_worker(
    job: Job, host: str, device: str, *, processes: int, images: int, seconds: float
) -> None:
    """Put into the provenance who has made rows: see ``cache.workers``."""
    job.provenance = with_worker(
        job.provenance, host, device, is_part=bool(job.partial.part), processes=processes,
        images=images, seconds=seconds,
    )  # fmt: skip
    job.partial.provenance = job.provenance


def note_speed(job: Job, seconds: float, stages: Mapping[str, float]) -> None:
    """Record how fast it went.

    Args:
        job: The cache.
        seconds: Wall time of the work.
        stages: The seconds of each stage, all threads together.
    """
    job.images_per_second = round(job.ledger.num_new / seconds, 2)
    job.provenance |= {
        "images_per_second": job.images_per_second,
        "stage_seconds": {k: round(v, 3) for k, v in sorted(stages.items())},
        "bottleneck": find_bottleneck(stages),
    }
