"""In a node of a Ray cluster: the actor, which lets a ``Worker`` run, and what it has to see there.

It has to see the images. The caches' folders it need not see: its shards are then written into a
folder of its own and sent, one at a time.

Reads: the manifest in ``CACHE.partial/``, to find out whether it is seen. Writes: a folder in the
node's place for temporary files, if it is not, while a task runs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import featcache
from featcache.errors import ConfigError, DataError, FeatcacheError
from featcache.extraction.manifest import open_manifest
from featcache.extraction.workers.coordinator import Failed
from featcache.extraction.workers.local import share_cores
from featcache.extraction.workers.messages import Bundled, sendable_error, unpack_facts
from featcache.extraction.workers.ray_cluster import Room
from featcache.extraction.workers.worker import (
    Facts,
    Message,
    Ready,
    ShardMade,
    StoppedError,
    Task,
    Worker,
)
from featcache.files import json_sha256, write_bytes

_SEEN_SECONDS = 3.0  # for a shared folder to show a manifest that was just written


@dataclass(frozen=True)
class Seen:
    """What an actor has to see as the command does.

    Attributes:
        manifests: The file of the manifest of each cache.
        sha256: Of what does not change in each.
        images: Position in the data set that is sent -> bytes, of images that can be read here.
    """

    manifests: tuple[Path, ...]
    sha256: tuple[str, ...]
    images: dict[int, int]


@dataclass(frozen=True)
class Start:
    """What an actor is told first.

    Attributes:
        version: Of featcache.
        path: Where modules are looked for by the command.
        device: ``cpu``, ``cuda`` (the GPU that Ray gives it) or ``mps``.
        room: Its share of the node.
        seen: What it has to see.
    """

    version: str
    path: list[str]
    device: str
    room: Room
    seen: Seen


@dataclass(frozen=True)
class Begun:
    """An actor is ready, and sends the shards of some caches, by name."""

    ready: Ready
    sent: tuple[str, ...]


@dataclass(frozen=True)
class SentShard:
    """A shard that was made where the cache's folder is not seen, and its bytes."""

    made: ShardMade
    data: bytes

    def write(self, folder: Path) -> ShardMade:
        """Write and sync it, and return what a worker that sees the folder would have said."""
        write_bytes(folder / self.made.receipt.file, self.data)
        return self.made


Answer = Message | SentShard | Failed

# ------------------------------------------------------------------------------------ what is seen


def what_is_seen(facts: Facts, manifests: Sequence[Path]) -> Seen:
    """Return what actors have to see, as it is seen here."""
    images = {}
    for position, sample in enumerate(facts.dataset.samples):
        with contextlib.suppress(DataError):
            images[position] = len(facts.dataset.read(sample))
    seen = tuple(_manifest_sha256(file) for file in manifests)
    return Seen(tuple(manifests), seen, images)


def _manifest_sha256(file: Path) -> str:
    """Return a hash of what stays the same in a manifest while workers are at work."""
    manifest = open_manifest(file)
    kept = (manifest.fingerprint, manifest.provenance.get("date"))
    parts = [None if part is None else asdict(part) for part in (manifest.engine, manifest.probes)]
    return json_sha256({"kept": kept, "parts": parts}, without="")


def _find_unseen(facts: Facts, seen: Seen) -> list[int]:
    """Return the numbers of the caches whose folders are not those that the command sees."""
    numbers = list(range(len(facts.jobs)))
    for wait in (_SEEN_SECONDS, 0.0):
        numbers = [n for n in numbers if not _is_seen(seen.manifests[n], seen.sha256[n])]
        time.sleep(wait if numbers else 0.0)
    return numbers


def _is_seen(file: Path, sha256: str) -> bool:
    with contextlib.suppress(FeatcacheError, OSError):
        return _manifest_sha256(file) == sha256
    return False


def _check_images(facts: Facts, seen: Seen) -> None:
    """Check that the images are those that the command sees.

    Raises:
        DataError: If none is.
    """
    for position, num_bytes in seen.images.items():
        with contextlib.suppress(DataError):
            if len(facts.dataset.read(facts.dataset.samples[position])) == num_bytes:
                return
    if seen.images:
        raise DataError(
            f"worker on {socket.gethostname()}", expected="the images that the command has found",
            found="none of them", where=facts.dataset.root,
            hint="Put DATA into a folder that all nodes share, under one name, or name it by a URL",
        )  # fmt: skip


# ------------------------------------------------------------------------------------- the actor


class FeatcacheActor:
    """What Ray makes in a process of its own; ``stop`` may be called while ``run`` runs."""

    def __init__(self) -> None:
        self._is_stopping = threading.Event()
        self._num_listed = threading.Semaphore(0)  # shards that were not waited for yet
        self._worker: Worker | None = None
        self._cores: list[int] = []
        self._sent: set[int] = set()  # numbers of the caches whose shards are sent
        self._folder = Path(tempfile.gettempdir()) / f"featcache-{secrets.token_hex(8)}"

    def begin(self, start: Start, facts: bytes) -> Begun | Failed:
        """Build the engines."""
        try:
            if start.version != featcache.__version__:
                raise ConfigError(
                    f"worker on {socket.gethostname()}", expected=f"featcache {start.version}",
                    found=featcache.__version__, hint="Install the same version on every node",
                )  # fmt: skip
            sys.path += [path for path in start.path if path not in sys.path]
            warnings.simplefilter("ignore")  # the driver's engine has said the same
            room = start.room
            self._cores = share_cores(room.number)[room.index] if room.number > 1 else []
            _stay_on(self._cores)
            known = unpack_facts(facts, "--ray")
            _check_images(known, start.seen)
            self._sent = set(_find_unseen(known, start.seen))
            jobs = tuple(
                replace(job, folder=self._folder) if number in self._sent else job
                for number, job in enumerate(known.jobs)
            )
            self._worker = Worker(replace(known, jobs=jobs), start.device)
        except BaseException as error:  # noqa: BLE001 (raised by the coordinator)
            return Failed(sendable_error(error))
        return Begun(self._worker.ready, tuple(jobs[number].name for number in self._sent))

    def listed(self) -> None:
        """Let ``run`` go on after a shard."""
        self._num_listed.release()

    def stop(self) -> None:
        """Let ``run`` hand back what it has."""
        self._is_stopping.set()

    def _check(self) -> None:
        if self._is_stopping.is_set():
            raise StoppedError

    def run(self, task: Task) -> Iterator[Answer]:
        """Run a task, and yield its messages as they come."""
        worker = self._worker
        assert worker is not None
        answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()  # with one shard at most

        def hand_on(message: Message) -> None:
            answers.put(self._send(message))
            if isinstance(message, ShardMade):
                self._num_listed.acquire()

        def work() -> None:
            _stay_on(self._cores)
            try:
                with self._own_folder():
                    worker.run(task, Bundled(hand_on), self._check)
            except BaseException as error:  # noqa: BLE001 (raised by the coordinator)
                answers.put(Failed(sendable_error(error)))
            finally:
                answers.put(None)

        threading.Thread(target=work, name="featcache-task", daemon=True).start()
        while (answer := answers.get()) is not None:
            yield answer

    @contextlib.contextmanager
    def _own_folder(self) -> Iterator[None]:
        """For shards that are sent; an actor that is killed leaves those of the task at hand."""
        if self._sent:
            self._folder.mkdir(mode=0o700)
        try:
            yield
        finally:
            if self._sent:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, message: Message) -> Message | SentShard:
        """Give a shard of its own folder its bytes, and remove it."""
        if not isinstance(message, ShardMade) or message.job not in self._sent:
            return message
        file = self._folder / message.receipt.file
        shard = SentShard(message, file.read_bytes())
        file.unlink()
        return shard


def _stay_on(cores: list[int]) -> None:
    """Keep this thread, and those that it starts, on some cores, if there are any."""
    if cores:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
