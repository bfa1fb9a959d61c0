"""What is left to be run, and which images a worker gets together: a piece.

A piece is as long as its worker takes half a minute for, and shorter towards the end, so that all
workers end at once. What a worker died with is given out again whole, then half by half, until the
image is found that kills its process: ``DEATHS_ALONE`` workers have died with it alone.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from featcache.extraction.plan import Job

TASK_SECONDS = 30.0
"""About how long a task takes. Between two of them a worker's pipeline runs empty once."""
_MOST_IMAGES = 1 << 16  # of a task
DEATHS_ALONE = 4
"""So many workers have to die with one image alone until it is blamed: they die of other things
too. Where each lived 3 s on average and an image alone takes one, two such deaths blamed 77 images
that had done nothing in 16,702 deaths, three 20 and four 2; where they lived 10 s or more, none
(tests/extraction/workers/test_pieces.py). An image that is to blame costs two more starts of a
worker."""


@dataclass
class Piece:
    """Images that are given out together.

    Attributes:
        positions: Of the images.
        is_suspect: A worker died with them: they are decoded in a child process, and halved if
            another one dies.
        num_deaths_alone: How many workers died with one image that was given to them alone.
        num_done: How many went through the pipeline of the worker that has them.
    """

    positions: Sequence[int]
    is_suspect: bool = False
    num_deaths_alone: int = 0
    num_done: int = 0


class Pieces:
    """Cuts the images that some caches still want into pieces.

    Args:
        jobs: The caches.
        positions: The images to be run.
        num_workers: How many share them.
        least: No piece has fewer images, unless that is all there is.
        most: None has more of a worker whose rate is not known: of the images that fill a shard.

    Attributes:
        num_done: How many images need nothing any more.
    """

    def __init__(
        self, jobs: Sequence[Job], positions: Sequence[int], num_workers: int, *, least: int,
        most: int,
    ) -> None:  # fmt: skip
        self._jobs, self._positions, self._num_workers = jobs, positions, num_workers
        batches = [job.engine.batch_size for job in jobs if job.engine is not None]
        self._least, self._most = max(least, 2 * max(batches)), most
        self._next = 0  # of the positions, where no piece was cut yet
        self._again: deque[Piece] = deque()
        self.num_done = 0

    @property
    def is_left(self) -> bool:
        """Whether there are images that nobody has."""
        return self._next < len(self._positions) or bool(self._again)

    def cut(self, images_per_second: float | None) -> Piece | None:
        """Return what a worker of such a rate is to do next: less at the end."""
        while self._again:
            piece = self._again.popleft()
            if wanted := self.still_wanted(piece):
                return replace(piece, positions=wanted, num_done=0)
        left = len(self._positions) - self._next
        if not left:
            return None
        most = self._most
        if images_per_second is not None:
            most = min(max(most, int(images_per_second * TASK_SECONDS)), _MOST_IMAGES)
        number = min(max(self._least, min(most, left // (3 * self._num_workers))), left)
        begin, self._next = self._next, self._next + number
        return Piece(self._positions[begin : self._next])

    def still_wanted(self, piece: Piece) -> Sequence[int]:
        """Return the images of a piece that a cache still wants."""
        ledgers = [job.ledger for job in self._jobs]
        wanted = (p for p in piece.positions if any(ledger.wants(p) for ledger in ledgers))
        return array("q", wanted)

    def put_back(self, piece: Piece) -> None:
        """Take back a piece whose worker has ended well, or was asked to end."""
        if left := self._take_done(piece):
            self._again.append(replace(piece, positions=left, num_done=0))

    def give_again(self, piece: Piece) -> int | None:
        """Take back a piece that a worker died with: it is given once whole, then half by half.

        Returns:
            The image that ``DEATHS_ALONE`` workers have died with alone, to blame; else None.
        """
        left = self._take_done(piece)
        if not left:
            return None
        num_alone = piece.num_deaths_alone + (len(piece.positions) == 1)
        if num_alone == DEATHS_ALONE:
            self.num_done += 1
            return left[0]
        middle = len(left) // 2 if piece.is_suspect else 0
        for part in (left[middle:], left[:middle]):
            if part:
                self._again.appendleft(Piece(part, is_suspect=True, num_deaths_alone=num_alone))
        return None

    def _take_done(self, piece: Piece) -> Sequence[int]:
        left = self.still_wanted(piece)
        self.num_done += len(piece.positions) - len(left)
        return left
