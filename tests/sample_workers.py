"""Workers that are threads of the test's process, and die when a test wants them to."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_network
from sample_images import write_tree

from featcache.extraction import extraction
from featcache.extraction.plan import Job
from featcache.extraction.workers.coordinator import Coordinator, Ended, Event, Failed
from featcache.extraction.workers.worker import (
    Facts,
    Message,
    ShardMade,
    StoppedError,
    Task,
    Worker,
)


class Death(BaseException):
    """Raised by a hook, where a process would be killed."""


Hook = Callable[[int, Task, Message | None], object]
"""Called with a worker's number and its task: before it runs, and with each message of it."""


class ThreadWorker:
    """A ``WorkerHandle`` that calls a ``Worker`` in a thread.

    Args:
        number: Of the worker.
        facts: What it is told.
        tell: Takes its messages.
        hook: May raise ``Death``; then nothing is heard of it any more.
    """

    def __init__(
        self, number: int, facts: Facts, tell: Callable[[Event], object], hook: Hook
    ) -> None:
        self._number, self._facts, self._tell, self._hook = number, facts, tell, hook
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._is_stopping, self._num_listed = threading.Event(), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def give(self, task: Task) -> None:
        self._tasks.put(task)

    def listed(self) -> None:
        self._num_listed.release()

    def stop(self) -> None:
        self._is_stopping.set()
        self._tasks.put(None)

    def kill(self) -> None:
        self._num_listed.release(99)  # it gets no answer any more
        self._thread.join()

    def _check(self) -> None:
        if self._is_stopping.is_set():
            raise StoppedError

    def _run(self) -> None:
        try:
            worker = Worker(self._facts, "cpu")
            self._tell(worker.ready)
            is_dead = False
            while (task := self._tasks.get()) is not None:
                self._hook(self._number, task, None)

                def hand_back(message: Message, task: Task = task) -> None:
                    nonlocal is_dead
                    if is_dead:  # a process that was killed cleans nothing up
                        raise Death
                    is_dead = True
                    self._hook(self._number, task, message)
                    is_dead = False
                    self._tell(message)
                    if isinstance(message, ShardMade):
                        self._num_listed.acquire()

                worker.run(task, hand_back, self._check)
            self._tell(Ended("asked to", was_asked=True))
        except Death:
            self._tell(Ended("killed by SIGKILL"))
        except Exception as error:  # noqa: BLE001 (raised by the coordinator)
            self._tell(Failed(error))
            self._tell(Ended("exit code 1"))


def use_threads(
    monkeypatch: pytest.MonkeyPatch, hook: Hook = lambda *_: None,
    facts_of: Callable[[int, Facts], Facts] = lambda _, facts: facts,
) -> None:  # fmt: skip
    """Let ``extract`` work with threads in place of processes."""

    def work_on(devices: Sequence[str], jobs: Sequence[Job], positions: Sequence[int]) -> None:
        def start(number: int, facts: Facts, tell: Any) -> ThreadWorker:
            return ThreadWorker(number, facts_of(number, facts), tell, hook)

        Coordinator(jobs, positions, start, len(devices)).run()

    monkeypatch.setattr(extraction, "work_on", work_on)


def images_and_sha256(folder: Path) -> tuple[Path, str]:
    """Return 46 images, three of them copies, and the sha256 of what one process makes of them."""
    root = write_tree(folder / "data")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for source, target in ((0, 45), (1, 2), (20, 3)):
        shutil.copy(files[source], files[target])
    whole = extraction.extract(
        root, root.parent / "w.h5", backbone=tiny_network.build(), batch_size=2, engine="folded"
    )
    return root, whole.content_sha256
