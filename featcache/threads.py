"""A pool of threads, of which one that hangs need not keep a process from ending."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")
_Task = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Threads:
    """Daemon threads: unlike those of concurrent.futures, one that hangs does not stop exit.

    Use as a context manager: on leaving, what has not begun is cancelled.

    Args:
        name: What they do; each is called ``featcache-NAME``.
        num_threads: How many.
        wait: On leaving, wait for what has begun. For work that ends: a daemon thread that is in
            C++ when the interpreter goes aborts the process (exit code 134 in place of 1).
    """

    def __init__(self, name: str, num_threads: int, *, wait: bool = False) -> None:
        self._name, self._wait = name, wait
        self._threads: list[threading.Thread] = []
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        for _ in range(num_threads):
            self._start()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=f"featcache-{self._name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # noqa: BLE001 (handed to whoever asks for the result)
                future.set_exception(error)
            del task, future, arguments  # or they would live until the next task comes

    def submit(self, function: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Run a function on the next free thread."""
        future: Future[_T] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def replace_one(self) -> None:
        """Start a thread in place of one that hangs (and may yet come back)."""
        self._start()

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        while True:  # drop what has not begun, then send everyone home
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is not None:
                task[0].cancel()
        for _thread in self._threads:
            self._tasks.put(None)
        if self._wait:
            for thread in self._threads:
                thread.join()
