"""A child process that answers requests one after the other, and is replaced if it dies or hangs.

Requests and answers are pickled: both ends are featcache's own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import queue
import struct
import subprocess
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import IO, TypeVar

from featcache.errors import DataError, TransientError
from featcache.files import child_process
from featcache.runtime import available_cores

_Self = TypeVar("_Self", bound="Child")


class Child:
    """Asks a module of featcache, run as a process, and ends it with the context.

    Args:
        module: Answers requests, (name, *arguments), on its standard input: see ``receive``.
        seconds: An answer that takes longer is given up.
        is_silent: Throw away what it writes to standard error.
    """

    def __init__(self, module: str, seconds: float, *, is_silent: bool = False) -> None:
        self._module, self._seconds = module, seconds
        self._stderr = subprocess.DEVNULL if is_silent else None
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        # A thread may be waiting for an answer, or about to ask. Killing its child, and starting no
        # other, makes it return and release the lock.
        self._is_closed = True
        if (child := self._child) is not None:
            child.kill()
        with self._lock:
            self._stop()

    def ask(self, *request: object) -> object:
        """Return the answer to a request.

        Raises:
            DataError: If the answer is one, or none came in time.
            TransientError: If the process died.
        """
        with self._lock:
            return self._ask_child(request)

    def _ask_child(self, request: tuple[object, ...]) -> object:
        child = self._start()
        if self._is_closed:
            child.kill()  # so that no answer comes
        timer = threading.Timer(self._seconds, child.kill)
        timer.start()
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            send(child.stdin, request)
            answer = receive(child.stdout)
        except (OSError, EOFError) as error:
            hung = not timer.is_alive()
            self._stop()
            reason = f"it hung for {self._seconds:.0f} s" if hung else "it crashed"
            kind = DataError if hung else TransientError  # perhaps the system was out of memory
            raise kind("image", expected="a decoder that ends", found=reason) from error
        finally:
            timer.cancel()
        if isinstance(answer, DataError):
            try:
                raise answer
            finally:
                # Else it and this frame hold each other, and the callers' frames their files.
                del answer
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            command, environment = child_process(self._module)
            self._child = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._stderr,
                start_new_session=True,  # Ctrl-C goes to the parent, which finishes its work
            )  # fmt: skip
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


class Children:
    """Child processes that a process shares: as many as cores, each asked by one at a time.

    They are started when they are needed, and end with this process.

    Args:
        module: See ``Child``; so is ``seconds``.
        seconds: An answer that takes longer is given up.
    """

    def __init__(self, module: str, seconds: float) -> None:
        self._module, self._seconds = module, seconds
        self.number = max(2, available_cores())
        self._reset()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):  # a fork must not talk to its parent's children
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._free: queue.LifoQueue[Child] = queue.LifoQueue()
        self._slots = threading.BoundedSemaphore(self.number)
        self._all: list[Child] = []

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Child]:
        """Lend a child; wait for one if all are lent."""
        free, slots = self._free, self._slots
        with slots:
            try:
                child = free.get_nowait()
            except queue.Empty:
                child = Child(self._module, self._seconds, is_silent=True)
                self._all.append(child)
            try:
                yield child
            finally:
                free.put(child)

    def close(self) -> None:
        """End the children; others are started if somebody asks again."""
        for child in self._all:
            child.__exit__(None, None, None)
        self._reset()


DICOM_READERS = Children("featcache.pixels.isolation", 30.0)
"""Read DICOM files; one that takes longer fails. A JPEG 2000 of 13 megapixels takes 2 s."""


def send(stream: IO[bytes], value: object) -> None:
    """Write a value for ``receive``."""
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> object:
    """Return the next value that the other end has sent.

    Raises:
        EOFError: If the other end is gone.
    """
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)
