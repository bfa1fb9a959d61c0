"""The coordinator: gives out tasks, lists the shards that come back, replaces workers that die.

It alone writes the manifest and settles the ledger. It knows nothing of how workers are reached: a
``StartWorker`` starts one and lets its messages come in.

Reads: nothing. Writes: the manifest in ``CACHE.partial/``.
"""

from __future__ import annotations

import contextlib
import queue
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn, Protocol

import torch

from featcache.data.dataset import ImageDataset
from featcache.errors import CacheError, FeatcacheError, warn_user
from featcache.extraction.engine_choice import drop_rows
from featcache.extraction.pipeline import find_bottleneck
from featcache.extraction.plan import Job
from featcache.extraction.work import (
    Patience,
    describe_kept,
    note_speed,
    note_worker,
    rows_per_shard,
)
from featcache.extraction.workers.worker import (
    Done,
    Facts,
    JobFacts,
    Message,
    NotFrozen,
    Progress,
    Ready,
    ShardMade,
    Task,
)
from featcache.formatting import count
from featcache.progress import Progress as Bar
from featcache.runtime import Interrupted, held_signals

TASK_SECONDS = 30.0
"""About how long a task takes. Between two of them a worker's pipeline runs empty once."""
MIN_IMAGES = 16
"""No task has fewer, unless that is all there is."""
_MOST_IMAGES = 1 << 16  # of a task
_MOST_STARTS = 3  # deaths in a row, at one place, of workers that were never ready
_MOST_DEATHS = 24  # in a row without an image done; halving a task of 65,536 images takes 19
_TIDY_SECONDS = 3.0  # to end workers, once they had the time to hand back what they have
_SILENT_SECONDS = 120.0  # at least: then it is said that a worker may hang
_MOST_EVENTS = 200  # that are acted on before workers get tasks again
CRASHED = "it crashed the worker's process"


@dataclass(frozen=True)
class Failed:
    """A worker came upon an error and has ended."""

    error: BaseException


@dataclass(frozen=True)
class Ended:
    """A worker has ended.

    Attributes:
        reason: How, in a few words: ``killed by signal 9``.
        was_asked: It was asked to end: that is not the fault of its images.
    """

    reason: str
    was_asked: bool = False


Event = Message | Failed | Ended


class WorkerHandle(Protocol):
    """A worker that was started; its messages come to the function it was started with."""

    def give(self, task: Task) -> None:
        """Let it run a task next. Does nothing if it has died."""

    def stop(self) -> None:
        """Let it hand back what it has and end: ``Ended`` comes last."""

    def kill(self) -> None:
        """End it now; no message comes any more."""


StartWorker = Callable[[int, Facts, Callable[[Event], object]], WorkerHandle]
"""Starts worker ``number``, from 0; it tells what happens, ``Ended`` at last, from any thread."""


@dataclass
class _Piece:
    """Images that are given out together.

    Attributes:
        positions: Of the images.
        num_deaths: How often a worker died with them.
        num_done: How many went through the pipeline of the worker that has them.
    """

    positions: Sequence[int]
    num_deaths: int = 0
    num_done: int = 0


@dataclass
class _Place:
    """Where a worker is, or was and will be again.

    Attributes:
        number: Of the place.
        handle: The worker; None before it is started and after it has ended.
        ready: What it said of itself, None before.
        piece: What it is at.
        generation: Messages of earlier workers of this place have other numbers.
        failure: Why no worker can be ready here, if that is known.
        is_refused: No worker is started here any more.
        num_starts: Workers in a row that ended before they were ready.
        patience: When the worker was heard of last, and how long it has been silent between.
        is_silent: It was said that the worker may hang.
    """

    number: int
    handle: WorkerHandle | None = None
    ready: Ready | None = None
    piece: _Piece | None = None
    generation: int = 0
    failure: BaseException | None = None
    is_refused: bool = False
    num_starts: int = 0
    patience: Patience = field(default_factory=Patience)
    is_silent: bool = False


@dataclass
class _Receipts:
    """What workers of one host and device have done."""

    num_images: int = 0
    seconds: float = 0.0
    num_workers: set[int] = field(default_factory=set)


class Coordinator:
    """Lets workers make the features that some caches of one data set still want.

    Args:
        jobs: The caches, each with its engine chosen. Only the facts of the engines are used.
        positions: The images to be run.
        start_worker: Starts a worker.
        num_workers: How many there are to be, at most.
    """

    def __init__(
        self, jobs: Sequence[Job], positions: Sequence[int], start_worker: StartWorker,
        num_workers: int,
    ) -> None:  # fmt: skip
        self._jobs, self._positions, self._start_worker = jobs, positions, start_worker
        self._rows = [rows_per_shard(job) for job in jobs]
        useful = -(-len(positions) // MIN_IMAGES)
        self._places = [_Place(number) for number in range(min(num_workers, useful))]
        samples = jobs[0].dataset.samples
        num_bytes = sum(samples[position].image_bytes for position in positions)
        self._facts = facts_of(jobs, self._rows, num_bytes // len(self._places))
        self._events: queue.SimpleQueue[tuple[_Place, int, Event]] = queue.SimpleQueue()
        self._taken: deque[tuple[_Place, int, Event]] = deque()  # and not acted on yet
        self._next = 0  # of the positions, where no piece was cut yet
        self._again: deque[_Piece] = deque()
        self._num_tasks = self._num_done = 0
        self._deaths = 0  # in a row
        self._receipts: dict[tuple[str, str], _Receipts] = {}
        self._stages = Counter[str]()
        self._say = jobs[0].options.say

    # ------------------------------------------------------------------------------------ the run

    def run(self) -> None:
        """Work until nothing is wanted any more.

        Raises:
            Interrupted: If a signal asked for the end; it says how far it got.
            FeatcacheError: If an image, the network, the disk or the workers do not allow to go on.
        """
        begin, total = time.perf_counter(), len(self._positions)
        try:
            with contextlib.ExitStack() as stack:
                check_signals = stack.enter_context(held_signals(self._seconds_to_end))
                for job in self._jobs:
                    stack.callback(job.partial.stop)
                stack.callback(self._note_receipts)
                shown = self._jobs[0].options.progress
                bar = stack.enter_context(Bar("extract", "image", total, shown=shown))
                self._say = bar.beside(self._say)
                stack.enter_context(self._workers_that_end())
                self._fill()
                while self._is_wanted():
                    check_signals()
                    self._take_some(bar)
                    self._say_who_is_silent()
        except Interrupted as stop:
            kept = "; ".join(map(describe_kept, self._jobs))
            message = f"interrupted: {kept}; the same command goes on"
            raise Interrupted(stop.signal_number, message) from None
        for job in self._jobs:
            note_speed(job, time.perf_counter() - begin, self._stages)

    def _is_wanted(self) -> bool:
        is_left = self._next < len(self._positions) or bool(self._again)
        return is_left or any(place.piece is not None for place in self._places)

    def _fill(self) -> None:
        """Start workers where there are none, give tasks to those that wait."""
        for place in self._places:
            is_left = self._next < len(self._positions) or self._again
            if not is_left:
                return
            if place.handle is None and not place.is_refused:
                self._start(place)
            if place.ready and place.piece is None and (piece := self._cut(place)):
                self._give(place, piece)
        if all(place.is_refused for place in self._places):
            raise next(place.failure for place in self._places if place.failure)

    def _start(self, place: _Place) -> None:
        place.generation += 1
        place.ready, place.failure, place.is_silent = None, None, False
        place.patience.begin()
        generation = place.generation

        def tell(event: Event) -> None:
            self._events.put((place, generation, event))

        place.handle = self._start_worker(place.number, self._facts, tell)

    def _take_some(self, bar: Bar) -> None:
        """Wait a moment for a message, and act on it and on those that wait behind it."""
        self._taken.extend(self._wait_for_some())
        with contextlib.ExitStack() as stack:
            for job in self._jobs:
                stack.enter_context(job.partial.together())
            while self._taken:  # what an error leaves here, ``_drain`` takes
                place, generation, event = self._taken.popleft()
                if generation == place.generation:
                    self._hear(place, event)
                    self._act(place, event)
            self._fill()  # before the manifest is written: nobody waits for the disk
        note = f"waits for {find_bottleneck(self._stages)}" if self._stages else None
        bar.move_to(self._num_under_way(), note)

    def _hear(self, place: _Place, event: Event) -> None:
        if isinstance(event, Progress):
            place.patience.note()
        else:  # its engine was built, or there was no batch
            place.patience.begin()
        place.is_silent = False

    def _say_who_is_silent(self) -> None:
        """Say once of a worker that it may hang: it is not killed, as it may be slow."""
        for place in self._places:
            is_at_work = place.handle is not None and (not place.ready or place.piece is not None)
            limit = max(_SILENT_SECONDS, 5 * place.patience.longest)
            if is_at_work and not place.is_silent and place.patience.silence > limit:
                place.is_silent = True
                who = f"Worker {place.number + 1}"
                if place.ready is not None:
                    who += f" (process {place.ready.process} on {place.ready.host})"
                self._say(
                    f"{who} has said nothing for {place.patience.silence:.0f} s: it is slow, or "
                    "hangs. It is left alone; if you end it, another one does its images."
                )

    def _seconds_to_end(self) -> float:
        """Return how long workers need to hand back what they have, and to end."""
        busy = [place.patience.seconds() for place in self._places if place.piece is not None]
        return max(busy, default=0.0) + _TIDY_SECONDS

    def _wait_for_some(self) -> Iterator[tuple[_Place, int, Event]]:
        with contextlib.suppress(queue.Empty):
            yield self._events.get(timeout=0.2)
            for _ in range(_MOST_EVENTS):
                yield self._events.get_nowait()

    def _num_under_way(self) -> int:
        return self._num_done + sum(p.piece.num_done for p in self._places if p.piece is not None)

    def _act(self, place: _Place, event: Event) -> None:
        if isinstance(event, Ready):
            place.ready, place.num_starts = event, 0
        elif isinstance(event, Progress):
            if place.piece is not None:
                place.piece.num_done += event.num_images
        elif isinstance(event, ShardMade):
            job = self._jobs[event.job]
            if job.partial.engine is not None:  # else its rows were dropped
                job.ledger.take_shard(job.partial.add_shard(event.receipt), event.rows)
            self._deaths = 0
        elif isinstance(event, Done):
            self._note_done(place, event)
        elif isinstance(event, NotFrozen):
            errors = [drop_rows(self._jobs[number]) for number in event.jobs]
            raise errors[0]
        elif isinstance(event, Failed):
            if place.ready is not None or not isinstance(event.error, FeatcacheError):
                raise event.error
            place.failure = event.error
        else:
            self._bury(place, event)

    # ---------------------------------------------------------------------------------- the tasks

    def _cut(self, place: _Place) -> _Piece | None:
        """Return what a worker is to do next: less at the end, so that all end at once."""
        while self._again:
            piece = self._again.popleft()
            if wanted := self._still_wanted(piece.positions):
                return replace(piece, positions=wanted, num_done=0)
        left = len(self._positions) - self._next
        if not left:
            return None
        least = 2 * max(job.engine.batch_size for job in self._jobs if job.engine is not None)
        assert place.ready is not None
        receipts = self._receipts.get((place.ready.host, place.ready.device))
        most = min(self._rows)
        if receipts is not None and receipts.seconds:
            rate = receipts.num_images / receipts.seconds
            most = min(max(most, int(rate * TASK_SECONDS)), _MOST_IMAGES)
        number = min(max(least, MIN_IMAGES, min(most, left // (3 * len(self._places)))), left)
        begin, self._next = self._next, self._next + number
        return _Piece(self._positions[begin : self._next])

    def _still_wanted(self, positions: Sequence[int]) -> Sequence[int]:
        ledgers = [job.ledger for job in self._jobs]
        return array("q", (p for p in positions if any(ledger.wants(p) for ledger in ledgers)))

    def _give(self, place: _Place, piece: _Piece) -> None:
        place.piece, self._num_tasks = piece, self._num_tasks + 1
        place.patience.begin()
        samples, positions = self._jobs[0].dataset.samples, piece.positions
        num_shards = len(positions) // min(self._rows) + 2
        task = Task(
            self._num_tasks, positions, tuple(samples[p] for p in positions),
            tuple([job.ledger.wants(p) for p in positions] for job in self._jobs),
            tuple(job.partial.reserve(num_shards) for job in self._jobs), num_shards,
            isolate=piece.num_deaths > 0,
        )  # fmt: skip
        assert place.handle is not None
        place.handle.give(task)

    def _note_done(self, place: _Place, done: Done) -> None:
        """Take what a task has come to; what is still wanted of it is given out again."""
        piece, place.piece = place.piece, None
        assert piece is not None
        assert place.ready is not None
        for number, position, reason in done.failures:
            self._jobs[number].ledger.fail(position, reason)
        self._deaths = 0
        self._stages.update(done.stages)
        kind = (place.ready.host, place.ready.device)
        receipts = self._receipts.setdefault(kind, _Receipts())
        receipts.num_images += done.num_images
        receipts.seconds += done.seconds
        receipts.num_workers.add(place.number)
        self._put_back(piece)

    def _put_back(self, piece: _Piece) -> None:
        left = self._still_wanted(piece.positions)
        self._num_done += len(piece.positions) - len(left)
        if left:
            self._again.append(_Piece(left, piece.num_deaths))

    # --------------------------------------------------------------------------------- the deaths

    def _bury(self, place: _Place, ended: Ended) -> None:
        """Take note of a worker that has ended though it has work, and what becomes of that."""
        piece, was_ready = place.piece, place.ready is not None
        place.handle, place.ready, place.piece = None, None, None
        place.generation += 1
        name = f"Worker {place.number + 1}"
        if not was_ready:
            self._bury_unready(place, ended)
            return
        if piece is None:
            self._say(f"{name} has ended: {ended.reason}. Another one takes its place.")
            return
        left = self._still_wanted(piece.positions)
        self._say(
            f"{name} has ended: {ended.reason}. Another one does the {count(len(left), 'image')} "
            "that it had in hand."
        )
        if ended.was_asked:
            self._put_back(piece)
            return
        self._deaths += 1
        if self._deaths >= _MOST_DEATHS:
            raise self._refusal("a worker that gets an image done", self._deaths, ended)
        self._num_done += len(piece.positions) - len(left)
        was_alone = len(piece.positions) == 1
        self._give_again(left, piece.num_deaths + 1, was_alone=was_alone)

    def _bury_unready(self, place: _Place, ended: Ended) -> None:
        """Start no other worker where one was refused, or some have died while they began."""
        name = f"Worker {place.number + 1}"
        if place.failure is None:
            place.num_starts += not ended.was_asked
            self._say(f"{name} has ended before it began: {ended.reason}.")
            if place.num_starts < _MOST_STARTS:
                return
            place.failure = self._refusal("a worker that begins", place.num_starts, ended)
        place.is_refused = True
        if not all(other.is_refused for other in self._places):
            warn_user(f"{name} is left out: {place.failure}")

    def _give_again(self, left: Sequence[int], num_deaths: int, *, was_alone: bool) -> None:
        """Put back images that a worker died with: once whole, then half by half."""
        if num_deaths < 2:
            self._again.extendleft([_Piece(left, num_deaths)] if left else [])
        elif left and was_alone:  # else the worker may have died of another, or of none
            self._deaths = 0
            self._num_done += 1
            for job in self._jobs:
                job.ledger.fail(left[0], CRASHED)
        else:
            middle = len(left) // 2
            for half in (left[middle:], left[:middle]):
                if half:
                    self._again.appendleft(_Piece(half, num_deaths - 1))

    def _refusal(self, expected: str, number: int, ended: Ended) -> CacheError:
        return CacheError(
            "extraction", expected=expected, found=f"{number} in a row that ended, the last "
            f"one {ended.reason}", where=self._jobs[0].partial.folder,
            hint="Look for memory that ran out, or run without --processes to see its message. The "
            "same command then goes on",
        )  # fmt: skip

    # ------------------------------------------------------------------------------------ the end

    @contextlib.contextmanager
    def _workers_that_end(self) -> Iterator[None]:
        """Let no worker stay; on an error they hand back what they have first."""
        try:
            yield
        except BaseException:
            self._drain()
            raise
        finally:
            handles = [place.handle for place in self._places if place.handle is not None]
            for handle in handles:
                handle.stop()
            for handle in handles:
                handle.kill()

    def _drain(self) -> None:
        """List the shards that workers have in hand; give up after a while."""
        deadline = time.monotonic() + self._seconds_to_end() - _TIDY_SECONDS
        for place in self._places:
            if place.handle is not None:
                place.handle.stop()
        while any(place.handle is not None for place in self._places):
            try:
                wait = max(0.0, deadline - time.monotonic())
                place, generation, event = (
                    self._taken.popleft() if self._taken else self._events.get(timeout=wait)
                )
            except queue.Empty:
                return
            if generation != place.generation:
                continue
            if isinstance(event, Ended):
                place.handle = None
            elif isinstance(event, ShardMade | Done):
                with contextlib.suppress(FeatcacheError):  # the first error is the one to be told
                    self._act(place, event)

    def _note_receipts(self) -> None:
        """Put into the provenance who has made how many rows."""
        for job in self._jobs:
            for (host, device), made in self._receipts.items():
                note_worker(
                    job, host, device, processes=len(made.num_workers), images=made.num_images,
                    seconds=made.seconds,
                )  # fmt: skip


def facts_of(jobs: Sequence[Job], rows: Sequence[int], image_bytes: int) -> Facts:
    """Return what workers are told of some caches, and free what the engines here hold.

    Args:
        jobs: The caches, each with its engine chosen.
        rows: How many rows fill a shard of each.
        image_bytes: Of the files that each worker may expect to decode.
    """
    facts = []
    for job, num_rows in zip(jobs, rows, strict=True):
        assert job.engine is not None
        assert job.partial.engine is not None
        assert job.probes is not None
        facts.append(
            JobFacts(
                job.path.name, job.recipe, job.partial.engine, job.num_views,
                job.partial.folder.absolute(), job.probes, num_rows,
            )
        )  # fmt: skip
        job.engine = replace(job.engine, forward=_never_run, is_frozen=_never_changed)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the first worker may have the same GPU
    dataset, workers = _without_samples(jobs[0].dataset), jobs[0].options.workers
    return Facts(dataset, tuple(facts), workers, image_bytes)


def _without_samples(dataset: ImageDataset) -> ImageDataset:
    """Return a data set with one sample a split: workers need the splits, and get their samples."""
    one = {sample.split: sample for sample in reversed(dataset.samples)}
    samples = tuple(one[split] for split in dataset.splits)
    root = dataset.root.absolute() if dataset.root.exists() else dataset.root  # a URL's is no path
    return replace(dataset, samples=samples, root=root, dicom=None)


def _never_run(batch: torch.Tensor) -> NoReturn:
    raise AssertionError("the workers run the network")


def _never_changed() -> bool:
    return True
