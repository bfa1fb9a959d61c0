"""A worker: makes features of the images of one task after another, and writes whole shards.

It is the same wherever it runs: whoever made it hands tasks in and takes messages back, by a pipe,
by Ray or by a call. It knows the images of its task alone, builds its engine from fixed facts, runs
the one pipeline, and never touches the manifest: a shard counts when the coordinator has listed it.

Reads: images. Writes: shards in ``CACHE.partial/``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from featcache.backbones.engine import Engine, build_engine
from featcache.cache.row_reader import RowReader
from featcache.data.dataset import ImageDataset, Samples
from featcache.errors import BackboneError, CacheError
from featcache.extraction.engine_choice import check_frozen
from featcache.extraction.ledger import Ledger, WorkedRow
from featcache.extraction.manifest import EngineFacts, Receipt
from featcache.extraction.pipeline import FeatureBatch, Lane
from featcache.extraction.plan import Job, Probes
from featcache.extraction.recipe import Recipe
from featcache.extraction.shards import Vectors
from featcache.extraction.work import (
    ShardWriter,
    lanes_of,
    most_unlisted,
    run_images,
    stream_parts,
    vectors_per_shard,
)
from featcache.pixels import acceleration
from featcache.runtime import Timer, device_name, resolve_device


@dataclass(frozen=True)
class JobFacts:
    """What a worker knows of one cache.

    Attributes:
        name: Of the cache, for messages.
        recipe: What makes its features.
        engine: How they have to be made.
        num_views: Split -> vectors of each of its images.
        folder: ``CACHE.partial``, where the shards go.
        probes: Images that the engine is checked on, and what it has to make of them.
        most_unlisted: So many vectors may be run and not listed: see ``work``.
    """

    name: str
    recipe: Recipe
    engine: EngineFacts
    num_views: Mapping[str, int]
    folder: Path
    probes: Probes
    most_unlisted: int


@dataclass(frozen=True)
class Facts:
    """What a worker is told once, before any task. Picklable if the backbones are.

    Attributes:
        dataset: The images are read from it; of its samples there is one a split.
        jobs: Of each cache.
        workers: Decoding threads, or ``auto``.
        image_bytes: Of the files that this worker may expect to decode: see ``acceleration``.
    """

    dataset: ImageDataset
    jobs: tuple[JobFacts, ...]
    workers: int | str
    image_bytes: int


def facts_of(jobs: Sequence[Job], image_bytes: int) -> Facts:
    """Return what workers are told of some caches, and free what the engines here hold.

    Args:
        jobs: The caches, each with its engine chosen.
        image_bytes: Of the files that each worker may expect to decode.
    """
    facts = []
    for job, most in zip(jobs, most_unlisted(lanes_of(jobs)), strict=True):
        assert job.engine is not None
        assert job.partial.engine is not None
        assert job.probes is not None
        facts.append(
            JobFacts(
                job.path.name, job.recipe, job.partial.engine, job.num_views,
                job.partial.folder.absolute(), job.probes, most,
            )
        )  # fmt: skip
        job.release_engine()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the first worker may have the same GPU
    dataset, workers = _without_samples(jobs[0].dataset), jobs[0].options.workers
    return Facts(dataset, tuple(facts), workers, image_bytes)


def _without_samples(dataset: ImageDataset) -> ImageDataset:
    """Return a data set with one sample a split: workers need the splits, and get their samples."""
    firsts = [dataset.samples.numbers_of(split)[:1] for split in dataset.splits]
    samples = dataset.samples.taken(np.concatenate(firsts))
    root = dataset.root.absolute() if dataset.root.exists() else dataset.root  # a URL's is no path
    return replace(dataset, samples=samples, root=root, dicom=None)


@dataclass(frozen=True)
class Task:
    """Images to be run.

    Attributes:
        number: Of the task; every message of it has it.
        positions: Of the images in the whole data set.
        samples: The images.
        wanted: Per cache, per image: whether its features are asked for.
        first_shards: Per cache, the number of the first shard that may be written ...
        num_shards: ... and of how many.
        isolate: Decode in a child process: these images may have killed a worker.
    """

    number: int
    positions: Sequence[int]
    samples: Samples
    wanted: tuple[Sequence[bool], ...]
    first_shards: tuple[int, ...]
    num_shards: int
    isolate: bool = False


@dataclass(frozen=True)
class Ready:
    """A worker's engines are built and agree with the manifest; it can be given tasks.

    Attributes:
        host: Name of its machine.
        device: Name of its device.
        process: Its number on that machine.
        vectors_per_shard: So many vectors fill its shards at least.
    """

    host: str
    device: str
    process: int
    vectors_per_shard: int


@dataclass(frozen=True)
class Progress:
    """So many more images of a task have been through the pipeline."""

    task: int
    num_images: int


@dataclass(frozen=True)
class ShardMade:
    """A shard was written and synced.

    Attributes:
        task: Number of the task.
        job: Number of the cache.
        receipt: Its line in the manifest.
        rows: Of its images, in its order.
    """

    task: int
    job: int
    receipt: Receipt
    rows: tuple[WorkedRow, ...]


@dataclass(frozen=True)
class Done:
    """A task has ended; all its shards were handed back before.

    Attributes:
        task: Its number.
        failures: (number of the cache, position, reason) of images that failed.
        num_images: How many went through the pipeline.
        seconds: How long it took.
        stages: The seconds of each stage, all threads together.
    """

    task: int
    failures: tuple[tuple[int, int, str], ...]
    num_images: int
    seconds: float
    stages: dict[str, float]


@dataclass(frozen=True)
class NotFrozen:
    """The network has changed: nothing it has ever made of these caches can be believed."""

    task: int
    jobs: tuple[int, ...]


Message = Ready | Progress | ShardMade | Done | NotFrozen
HandBack = Callable[[Message], object]
"""Hands a message to the coordinator. Of a shard it returns when that is listed: a worker dies with
no more than a shard that is not."""


class StoppedError(Exception):
    """Raised by ``check``: the worker is to hand back what it has, and to begin nothing more."""


class Worker:
    """Makes features on one device.

    Args:
        facts: What is to be made, and how.
        device: Where, as ``resolve_device`` takes it.

    Raises:
        BackboneError: If the engine's features on this device are not those of the manifest.
        CacheError: If its batches do not fit into the memory here.
    """

    def __init__(self, facts: Facts, device: str = "auto") -> None:
        self._facts, self._device = facts, resolve_device(device).torch()
        torch.set_num_threads(facts.jobs[0].engine.num_threads)
        # By all of its tasks: each alone may be too small for the kernels to be worth it.
        acceleration.start_for(facts.image_bytes)
        self._engines = [self._build(job) for job in facts.jobs]
        pairs = zip(facts.jobs, self._engines, strict=True)
        lanes = [Lane(job.recipe, engine) for job, engine in pairs]
        # How many batches are under way depends on the cores here.
        self._sizes = vectors_per_shard(lanes, [job.most_unlisted for job in facts.jobs])

    def _build(self, job: JobFacts) -> Engine:
        wanted, recipe, where = job.engine, job.recipe, f"{socket.gethostname()}, {self._device}"
        try:
            engine = build_engine(
                recipe.backbone, self._device, list(job.probes.images), precision=wanted.precision,
                batch_size=wanted.batch_size, name=wanted.engine,
                feature_dtype=recipe.feature_dtype, reference=job.probes.features,
            )  # fmt: skip
        except BackboneError as error:
            raise BackboneError(
                f"worker for {job.name}", where=where, found=error.found,
                expected=f"{error.expected} of those that the coordinator has, of a few images",
                hint="This machine or device computes something else: leave it out, or extract on "
                "it alone",
            ) from error  # fmt: skip
        if engine.batch_size != wanted.batch_size:
            raise CacheError(
                f"worker for {job.name}", expected=f"memory for batches of {wanted.batch_size}",
                found=f"{engine.batch_size} at most", where=where,
                hint="Leave this device out, or begin with a smaller --batch-size and --rebuild",
            )  # fmt: skip
        return engine

    @property
    def ready(self) -> Ready:
        """What it says of itself before the first task."""
        name = device_name(self._device)
        return Ready(socket.gethostname(), name, os.getpid(), min(self._sizes))

    def run(
        self, task: Task, hand_back: HandBack, check: Callable[[], object] = lambda: None
    ) -> bool:
        """Run a task; hand back each shard as soon as it is synced, and at last what failed.

        Args:
            task: The images.
            hand_back: Called with each message, in this thread.
            check: Called after each batch. It may raise ``StoppedError``: then the rows at hand
                become a shard, and images that are not handed back were not done.

        Returns:
            Whether it came to the end of the task.

        Raises:
            FeatcacheError: If the network or the disk does not allow to go on.
        """
        facts, timer, begin = self._facts, Timer(), time.perf_counter()
        dataset = replace(facts.dataset, samples=task.samples)
        shares = [
            _Share(number, job, engine, dataset, task, hand_back=hand_back)
            for number, (job, engine) in enumerate(zip(facts.jobs, self._engines, strict=True))
        ]
        writers = [ShardWriter(s, timer, n) for s, n in zip(shares, self._sizes, strict=True)]
        num_images = 0

        def stream(positions: Sequence[int], num_isolated: int) -> Iterator[FeatureBatch]:
            nonlocal num_images
            # The splits are those of the whole data set: they decide which images get views.
            for batch in stream_parts(
                shares, facts.dataset, task.samples, positions, num_isolated,
                workers=facts.workers, timer=timer,
            ):  # fmt: skip
                yield batch
                num_images += len(batch.outcomes)
                hand_back(Progress(task.number, len(batch.outcomes)))

        every = range(len(task.samples))
        is_whole = False
        try:
            with contextlib.suppress(StoppedError), contextlib.ExitStack() as stack:
                for writer in writers:
                    stack.callback(writer.flush)  # whatever becomes of the others
                num_isolated = len(every) if task.isolate else 0
                run_images(shares, writers, stream, every, num_isolated=num_isolated, check=check)
                is_whole = True
            for share in shares:
                check_frozen(share)
        except BackboneError:
            if changed := tuple(s.number for s in shares if s.partial.is_cleared):
                hand_back(NotFrozen(task.number, changed))
            raise
        failures = tuple(
            (share.number, task.positions[position], reason)
            for share in shares
            for position, reason in share.ledger.reasons.items()
        )
        seconds = time.perf_counter() - begin
        hand_back(Done(task.number, failures, num_images, seconds, dict(timer.seconds)))
        return is_whole


class _ShardNames:
    """The shards that a task may write of one cache."""

    def __init__(self, folder: Path, first: int, number: int) -> None:
        self._folder, self._next, self._end = folder, first, first + number
        self.is_cleared = False

    @property
    def next_shard(self) -> Path:
        assert self._next < self._end, "more shards than were set aside"
        return self._folder / f"shard.{self._next:05d}"

    def use_one(self) -> None:
        self._next += 1

    def clear(self) -> None:
        self.is_cleared = True


class _Share:
    """What one cache gets of one task: a ``Work``."""

    def __init__(
        self, number: int, job: JobFacts, engine: Engine, dataset: ImageDataset, task: Task, *,
        hand_back: HandBack,
    ) -> None:  # fmt: skip
        self.number, self.recipe, self.engine = number, job.recipe, engine
        self.dtype = np.dtype(job.recipe.feature_dtype).newbyteorder("<")
        self.partial = _ShardNames(job.folder, task.first_shards[number], task.num_shards)
        # Failures are counted by the coordinator: one task may well be all bad.
        self.ledger = Ledger(dataset, job.num_views)
        for position, is_wanted in enumerate(task.wanted[number]):
            if not is_wanted:
                self.ledger.leave_out(position)
        self._task, self._hand_back = task, hand_back

    def list_shard(
        self, receipt: Receipt, positions: Sequence[int], table: Sequence[Mapping[str, Any]]
    ) -> Vectors:
        self.partial.use_one()
        rows = tuple(
            (
                self._task.positions[position], bytes.fromhex(row["image_sha256"]),
                row["truncated"], row["views"],
            )
            for position, row in zip(positions, table, strict=True)
        )  # fmt: skip
        self._hand_back(ShardMade(self._task.number, self.number, receipt, rows))
        return _never_read


def _never_read() -> RowReader:
    return _refuse()


def _refuse() -> NoReturn:
    raise AssertionError("a worker reads no features")
