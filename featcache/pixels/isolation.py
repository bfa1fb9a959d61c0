"""Decode images in a child process: an image that hangs or crashes the decoder fails alone.

Threads decode faster, so this is for suspicious images only: those whose decoding took too long,
those that were being decoded when an earlier run was killed, and all DICOM files.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import IO, Any

from featcache.child import DICOM_READERS, Child, receive, send
from featcache.data import dicom_files
from featcache.errors import DataError
from featcache.pixels import acceleration, dicom
from featcache.pixels.dicom import DicomPicture, read_dicom
from featcache.pixels.dicom_display import failure
from featcache.pixels.dicom_headers import hash_pixels, read_headers
from featcache.pixels.dicom_rules import DicomRules
from featcache.pixels.images import PixelRules
from featcache.pixels.inspection import deep_kind, deep_maximum, glance
from featcache.pixels.views import Rendering, ViewRules, render
from featcache.untrusted import MAX_PIXELS

DECODE_SECONDS = 60.0
"""An image that takes longer fails; a 200-megapixel PNG takes about 3 s."""


class IsolatedDecoder(Child):
    """Decodes one image after another in a child process, which is replaced if it dies or hangs.

    Use as a context manager; the child ends with it.

    Args:
        seconds: An image that takes longer fails.
    """

    def __init__(self, seconds: float = DECODE_SECONDS) -> None:
        super().__init__("featcache.pixels.isolation", seconds)

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
        rendering = self.ask(name, data, list(recipes), sha256)
        assert isinstance(rendering, Rendering)
        return rendering

    def deep_maximum(self, data: bytes, max_pixels: int = MAX_PIXELS) -> int | None:
        """Do what ``inspection.deep_maximum`` does.

        Raises:
            DataError: If the decoder hung on it.
            TransientError: If the decoder's process died.
        """
        maximum = self.ask("deep_maximum", data, max_pixels)
        assert maximum is None or isinstance(maximum, int)
        return maximum

    def deep_kind(self, data: bytes) -> str | None:
        """Do what ``inspection.deep_kind`` does.

        Raises:
            DataError: If the decoder hung on it.
            TransientError: If the decoder's process died.
        """
        kind = self.ask("deep_kind", data)
        assert kind is None or isinstance(kind, str)
        return kind


def decode_dicom(data: bytes, rules: DicomRules, max_pixels: int) -> DicomPicture:
    """Do what ``dicom.read_dicom`` does, in a child process. Safe to call from many threads.

    Raises:
        DataError: If the file is bad, or its decoder hung on it.
        TransientError: If the decoder's process died.
    """
    if dicom.is_child_process():
        return read_dicom(data, rules, max_pixels)
    if not dicom_files.is_installed():
        raise failure(dicom.MISSING)
    with DICOM_READERS.borrow() as child:
        picture = child.ask("read_dicom", data, rules, max_pixels)
    assert isinstance(picture, DicomPicture)
    return picture


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Call the functions that are requested, (name, *arguments), until the parent is gone."""
    functions: dict[str, Callable[..., object]] = {
        "render": render, "render_with_facts": functools.partial(render, with_facts=True),
        "deep_maximum": deep_maximum, "deep_kind": deep_kind, "glance": glance,
        "read_dicom": read_dicom, "read_headers": read_headers, "hash_pixels": hash_pixels,
    }  # fmt: skip
    num_bytes = 0
    while True:
        try:
            request: Any = receive(requests)
        except EOFError:
            return
        if num_bytes < acceleration.WORTH_BYTES:  # of a server, which lives for long
            num_bytes += len(request[1])
            acceleration.start_for(num_bytes)
        try:
            answer = functions[request[0]](*request[1:])
        except DataError as error:
            answer = error
        send(answers, answer)


if __name__ == "__main__":
    with dicom.child_process():
        _serve(sys.stdin.buffer, sys.stdout.buffer)
