"""Decode images in a child process: an image that hangs or crashes the decoder fails alone.

Threads decode faster, so this is for suspicious images only: those whose decoding took too long,
and those that were being decoded when an earlier run was killed.
"""

from __future__ import annotations

import functools
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO, Any

from featcache.errors import DataError, TransientError
from featcache.files import child_process
from featcache.pixels import acceleration
from featcache.pixels.images import PixelRules, deep_kind, deep_maximum, glance
from featcache.pixels.views import Rendering, ViewRules, render
from featcache.untrusted import MAX_PIXELS

DECODE_SECONDS = 60.0
"""An image that takes longer fails; a 200-megapixel PNG takes about 3 s."""


class IsolatedDecoder:
    """Decodes one image after another in a child process, which is replaced if it dies or hangs.

    Use as a context manager; the child ends with it.
    """

    def __init__(self, seconds: float = DECODE_SECONDS) -> None:
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> IsolatedDecoder:
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

    def render(
        self, data: bytes, recipes: Sequence[tuple[PixelRules, ViewRules]], sha256: bytes, *,
        with_facts: bool = False,
    ) -> Rendering:  # fmt: skip
        """Do what ``views.render`` does.

        Raises:
            DataError: If the image is bad, or the decoder hung on it.
            TransientError: If the decoder's process died.
        """
        name = "render_with_facts" if with_facts else "render"
        rendering = self._ask(name, data, list(recipes), sha256)
        assert isinstance(rendering, Rendering)
        return rendering

    def deep_maximum(self, data: bytes, max_pixels: int = MAX_PIXELS) -> int | None:
        """Do what ``images.deep_maximum`` does.

        Raises:
            DataError: If the decoder hung on it.
            TransientError: If the decoder's process died.
        """
        maximum = self._ask("deep_maximum", data, max_pixels)
        assert maximum is None or isinstance(maximum, int)
        return maximum

    def deep_kind(self, data: bytes) -> str | None:
        """Do what ``images.deep_kind`` does.

        Raises:
            DataError: If the decoder hung on it.
            TransientError: If the decoder's process died.
        """
        kind = self._ask("deep_kind", data)
        assert kind is None or isinstance(kind, str)
        return kind

    def _ask(self, *request: object) -> object:
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
            send_message(child.stdin, request)
            answer = receive_message(child.stdout)
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
            command, environment = child_process("featcache.pixels.isolation")
            self._child = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C goes to the parent, which finishes its work
            )  # fmt: skip
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def send_message(stream: IO[bytes], value: object) -> None:
    """Write a value to another process of ours."""
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def receive_message(stream: IO[bytes]) -> object:
    """Return the next value that another process of ours has written.

    Raises:
        EOFError: If it is gone.
    """
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Call the functions that are requested, (name, *arguments), until the parent is gone."""
    functions: dict[str, Callable[..., object]] = {
        "render": render, "render_with_facts": functools.partial(render, with_facts=True),
        "deep_maximum": deep_maximum, "deep_kind": deep_kind, "glance": glance,
    }  # fmt: skip
    num_bytes = 0
    while True:
        try:
            request: Any = receive_message(requests)
        except EOFError:
            return
        if num_bytes < acceleration.WORTH_BYTES:  # of a server, which lives for long
            num_bytes += len(request[1])
            acceleration.start_for(num_bytes)
        try:
            answer = functions[request[0]](*request[1:])
        except DataError as error:
            answer = error
        send_message(answers, answer)


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
