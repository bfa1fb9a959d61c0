"""The coordinator: gives out tasks, lists the shards that come back, replaces workers that die.

It alone writes the manifest and settles the ledger. It knows nothing of how workers are reached: a
``StartWorker`` starts one and lets its messages come in.

Reads: nothing. Writes: the manifest in ``CACHE.partial/``.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from featcache.errors import CacheError, FeatcacheError, warn_user
from featcache.extraction.engine_choice import drop_rows
from featcache.extraction.pipeline import find_bottleneck
from featcache.extraction.plan import Job
from featcache.extraction.work import (
    describe_kept,
    lanes_of,
    note_speed,
    note_worker,
    vectors_per_shard,
)
from featcache.extraction.workers.pieces import Piece, Pieces
from featcache.extraction.workers.places import Place, WorkerHandle
from featcache.extraction.workers.worker import (
    Done,
    Facts,
    Message,
    NotFrozen,
    Progress,
    Ready,
    ShardMade,
    Task,
    facts_of,
)
from featcache.formatting import count
from featcache.progress import Progress as Bar
from featcache.runtime import Interrupted, held_signals

MIN_IMAGES = 16
"""No task has fewer, unless that is all there is."""
_MOST_STARTS = 3  # deaths in a row, at one place, of workers that were never ready
_MOST_DEATHS = 24  # in a row without an image done; halving a task of 65,536 images takes 21
_TIDY_SECONDS = 3.0  # to end workers, once they had the time to hand back what they have
_MOST_EVENTS = 200  # that are acted on before workers get tasks again
CRASHED = "it crashed the worker's process"


@dataclass(frozen=True)
class Failed:
    """A worker came upon an error and has ended.

    Attributes:
        error: The error.
        ends_all: No other worker could do better.
    """

    error: BaseException
    ends_all: bool = False


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


StartWorker = Callable[[int, Facts, Callable[[Event], object]], WorkerHandle]
"""Starts worker ``number``, from 0; it tells what happens, ``Ended`` at last, from any thread."""


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
        # Of the images to train on; others may have fewer.
        self._num_views = max(job.recipe.view_rules.num_views for job in jobs)
        most = -(-min(vectors_per_shard(lanes_of(jobs))) // self._num_views)
        useful = -(-len(positions) // MIN_IMAGES)
        self._places = [Place(number) for number in range(min(num_workers, useful))]
        samples = jobs[0].dataset.samples
        num_bytes = sum(map(samples.image_bytes.__getitem__, positions))
        self._facts = facts_of(jobs, num_bytes // len(self._places))
        self._events: queue.SimpleQueue[tuple[Place, int, Event]] = queue.SimpleQueue()
        self._taken: deque[tuple[Place, int, Event]] = deque()  # and not acted on yet
        self._pieces = Pieces(jobs, positions, len(self._places), least=MIN_IMAGES, most=most)
        self._unheard: list[WorkerHandle] = []  # they wait until their shards are listed
        self._num_tasks = 0
        self._deaths = 0  # in a row
        self._ran_from: float | None = None  # since when a worker was ready
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
        total = len(self._positions)
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
                    for line in filter(None, [place.tell_silence() for place in self._places]):
                        self._say(line)
        except Interrupted as stop:
            kept = "; ".join(map(describe_kept, self._jobs))
            message = f"interrupted: {kept}; the same command goes on"
            raise Interrupted(stop.signal_number, message) from None
        if self._ran_from is not None:
            for job in self._jobs:
                note_speed(job, time.perf_counter() - self._ran_from, self._stages)

    def _is_wanted(self) -> bool:
        is_under_way = any(place.piece is not None for place in self._places)
        return self._pieces.is_left or is_under_way

    def _fill(self) -> None:
        """Start workers where there are none, give tasks to those that wait."""
        for place in self._places:
            if not self._pieces.is_left:
                return
            if place.handle is None and not place.is_refused:
                self._start(place)
            if place.ready and place.piece is None:
                receipts = self._receipts.get((place.ready.host, place.ready.device))
                rate = receipts and receipts.seconds and receipts.num_images / receipts.seconds
                if piece := self._pieces.cut(rate or None):
                    self._give(place, piece)
        if all(place.is_refused for place in self._places):
            raise next(place.failure for place in self._places if place.failure)

    def _start(self, place: Place) -> None:
        generation = place.begin()

        def tell(event: Event) -> None:
            self._events.put((place, generation, event))

        place.handle = self._start_worker(place.number, self._facts, tell)

    def _take_some(self, bar: Bar) -> None:
        """Wait a moment for a message, and act on it and on those that wait behind it."""
        self._taken.extend(self._wait_for_some())
        with contextlib.ExitStack() as stack:
            stack.callback(self._say_listed)  # last, and whatever happens
            for job in self._jobs:
                stack.enter_context(job.partial.together())
            while self._taken:  # what an error leaves here, ``_drain`` takes
                place, generation, event = self._taken.popleft()
                if generation == place.generation:
                    place.hear(of_batch=isinstance(event, Progress))
                    self._act(place, event)
            self._fill()  # before the manifest is written: nobody waits for the disk
        note = f"waits for {find_bottleneck(self._stages)}" if self._stages else None
        bar.move_to(self._num_under_way(), note)

    def _say_listed(self) -> None:
        """Let workers go on whose shards are in the manifest now."""
        while self._unheard:
            self._unheard.pop().listed()

    def _seconds_to_end(self) -> float:
        """Return how long workers need to hand back what they have, and to end."""
        busy = [place.patience.seconds() for place in self._places if place.piece is not None]
        return max(busy, default=0.0) + _TIDY_SECONDS

    def _wait_for_some(self) -> Iterator[tuple[Place, int, Event]]:
        with contextlib.suppress(queue.Empty):
            yield self._events.get(timeout=0.2)
            for _ in range(_MOST_EVENTS):
                yield self._events.get_nowait()

    def _num_under_way(self) -> int:
        return self._pieces.num_done + sum(
            p.piece.num_done for p in self._places if p.piece is not None
        )

    def _act(self, place: Place, event: Event) -> None:
        if isinstance(event, Ready):
            place.ready, place.num_starts = event, 0
            self._ran_from = self._ran_from or time.perf_counter()
        elif isinstance(event, Progress):
            if place.piece is not None:
                place.piece.num_done += event.num_images
        elif isinstance(event, ShardMade):
            assert place.handle is not None
            self._unheard.append(place.handle)
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
            is_known = isinstance(event.error, FeatcacheError)
            if event.ends_all or place.ready is not None or not is_known:
                raise event.error
            place.failure = event.error
        else:
            self._bury(place, event)

    # ---------------------------------------------------------------------------------- the tasks

    def _give(self, place: Place, piece: Piece) -> None:
        place.piece, self._num_tasks = piece, self._num_tasks + 1
        place.patience.begin()
        assert place.ready is not None
        samples, positions = self._jobs[0].dataset.samples, piece.positions
        num_shards = len(positions) * self._num_views // place.ready.vectors_per_shard + 2
        task = Task(
            self._num_tasks, positions, samples.taken(np.array(positions, np.int64)),
            tuple([job.ledger.wants(p) for p in positions] for job in self._jobs),
            tuple(job.partial.reserve(num_shards) for job in self._jobs), num_shards,
            isolate=piece.is_suspect,
        )  # fmt: skip
        assert place.handle is not None
        place.handle.give(task)

    def _note_done(self, place: Place, done: Done) -> None:
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
        self._pieces.put_back(piece)

    # --------------------------------------------------------------------------------- the deaths

    def _bury(self, place: Place, ended: Ended) -> None:
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
        left = self._pieces.still_wanted(piece)
        self._say(
            f"{name} has ended: {ended.reason}. Another one does the {count(len(left), 'image')} "
            "that it had in hand."
        )
        if ended.was_asked:
            self._pieces.put_back(piece)
            return
        self._deaths += 1
        if self._deaths >= _MOST_DEATHS:
            raise self._refusal("a worker that gets an image done", self._deaths, ended)
        if (to_blame := self._pieces.give_again(piece)) is not None:
            self._deaths = 0
            for job in self._jobs:
                job.ledger.fail(to_blame, CRASHED)

    def _bury_unready(self, place: Place, ended: Ended) -> None:
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
                self._say_listed()

    def _note_receipts(self) -> None:
        """Put into the provenance who has made how many rows."""
        for job in self._jobs:
            for (host, device), made in self._receipts.items():
                note_worker(
                    job, host, device, processes=len(made.num_workers), images=made.num_images,
                    seconds=made.seconds,
                )  # fmt: skip
