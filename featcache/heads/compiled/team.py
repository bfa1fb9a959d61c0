"""Threads of Python that share the pieces of a step, and BLAS held to one thread."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_Task = tuple[Callable[..., None], Sequence[tuple[Any, ...]]]


class Team:
    """The calling thread and some others, which take pieces in turn. Use as a context manager.

    Handing over takes 20 microseconds, a tenth of what ``featcache.threads`` needs.

    Args:
        num_threads: The calling thread included; with 1 there is no other. Of n threads, each takes
            every n-th task.
    """

    def __init__(self, num_threads: int = 1) -> None:
        self.size = num_threads
        self._tasks = [queue.SimpleQueue[_Task | None]() for _ in range(num_threads - 1)]
        self._ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=[tasks], name="featcache-team", daemon=True)
            for tasks in self._tasks
        ]

    def run(self, function: Callable[..., None], tasks: Sequence[tuple[Any, ...]]) -> None:
        """Call a function with each tuple of arguments, in no fixed order; return when all are."""
        others = [tasks[number :: self.size] for number in range(1, self.size)]
        others = [part for part in others if part]
        for part, waiting in zip(others, self._tasks, strict=False):
            waiting.put((function, part))
        error: BaseException | None = None
        try:
            for arguments in tasks[:: self.size]:
                function(*arguments)
        finally:
            for _ in others:
                error = self._ends.get() or error
        if error is not None:
            raise error

    def _work(self, tasks: queue.SimpleQueue[_Task | None]) -> None:
        while (task := tasks.get()) is not None:
            error: BaseException | None = None
            try:
                function, part = task
                for arguments in part:
                    function(*arguments)
            except BaseException as raised:  # noqa: BLE001 (raised again by ``run``)
                error = raised
            self._ends.put(error)

    def __enter__(self) -> Team:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for thread in self._threads:
            thread.join()


class _BlasLimit:
    """Holds BLAS to one thread while anyone wants it, then gives it its number back."""

    def __init__(self) -> None:
        self._lock, self._users, self._limits = threading.Lock(), 0, contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._limits.enter_context(_controller().limit(limits=1, user_api="blas"))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._limits.close()


@functools.cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


one_blas_thread = _BlasLimit()
"""``with one_blas_thread():`` lets NumPy's matrix products use only the thread that calls them."""
