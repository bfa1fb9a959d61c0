"""A pool of daemon threads: a thread that hangs does not keep the process from ending."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

_T = TypeVar("_T")
_Task = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]

_own = threading.local()


def stop_if_asked() -> None:
    """Do nothing, unless this is a thread of a pool that is being left: then end its task.

    Long tasks call it between their steps, so that Ctrl-C does not wait for their end.

    Raises:
        CancelledError: If so.
    """
    is_leaving: threading.Event | None = getattr(_own, "is_leaving", None)
    if is_leaving is not None and is_leaving.is_set():
        raise CancelledError


class Threads:
    """A pool of daemon threads, which unlike concurrent.futures does not wait for them at exit.

    Use as a context manager: on leaving, tasks that have not started are cancelled, and those that
    call ``stop_if_asked`` end there.

    Args:
        name: The threads are called ``featcache-NAME``.
        num_threads: Number of threads.
        wait: On leaving, wait for running tasks. Use it for tasks that are sure to end: a daemon
            thread in C++ code at interpreter exit aborts the process (exit code 134 instead of 1).
    """

    def __init__(self, name: str, num_threads: int, *, wait: bool = False) -> None:
        self._name, self._wait = name, wait
        self._is_leaving = threading.Event()
        self._threads: list[threading.Thread] = []
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        for _ in range(num_threads):
            self._start()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=f"featcache-{self._name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        _own.is_leaving = self._is_leaving
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # noqa: BLE001 (raised by future.result())
                future.set_exception(error)
            del task, future, arguments  # else they stay referenced until the next task

    def submit(self, function: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Run a function on the next free thread."""
        future: Future[_T] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def replace_one(self) -> None:
        """Start one more thread, to replace one that hangs (it may still come back)."""
        self._start()

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_leaving.set()
        while True:  # cancel what has not started, then end the threads
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
