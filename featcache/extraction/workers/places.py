"""Places of workers: who is at work at each, on what, and since when nothing was heard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from featcache.extraction.work import Patience
from featcache.extraction.workers.pieces import Piece
from featcache.extraction.workers.worker import Ready, Task

SILENT_SECONDS = 120.0
"""At least: then it is said that a worker may hang."""


class WorkerHandle(Protocol):
    """A worker that was started; its messages come to the function it was started with."""

    def give(self, task: Task) -> None:
        """Let it run a task next. Does nothing if it has died."""

    def listed(self) -> None:
        """Let it go on: the shard that it handed in is listed, or will never be."""

    def stop(self) -> None:
        """Let it hand back what it has and end: ``Ended`` comes last."""

    def kill(self) -> None:
        """End it now; no message comes any more."""


@dataclass
class Place:
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
    piece: Piece | None = None
    generation: int = 0
    failure: BaseException | None = None
    is_refused: bool = False
    num_starts: int = 0
    patience: Patience = field(default_factory=Patience)
    is_silent: bool = False

    def begin(self) -> int:
        """Make room for a new worker; return its generation."""
        self.generation += 1
        self.ready, self.failure, self.is_silent = None, None, False
        self.patience.begin()
        return self.generation

    def hear(self, *, of_batch: bool) -> None:
        """Take note of a message; of a batch it tells how long one takes."""
        if of_batch:
            self.patience.note()
        else:
            self.patience.begin()
        self.is_silent = False

    def tell_silence(self) -> str | None:
        """Return, once, what to say of a worker that may hang. It may be slow: it is not killed."""
        is_at_work = self.handle is not None and (not self.ready or self.piece is not None)
        limit = max(SILENT_SECONDS, 5 * self.patience.longest)
        if not is_at_work or self.is_silent or self.patience.silence <= limit:
            return None
        self.is_silent = True
        who = f"Worker {self.number + 1}"
        if self.ready is not None:
            who += f" (process {self.ready.process} on {self.ready.host})"
        return (
            f"{who} has said nothing for {self.patience.silence:.0f} s: it is slow, or hangs. It "
            "is left alone; if you end it, another one does its images."
        )
