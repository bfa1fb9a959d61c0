"""The files of a request, parsed from its stream: they stay in memory, whatever their size.

Starlette's own parser writes parts of more than 1 MiB into temporary files, and patients' images
must not be left on a disk.

Reads: the body of a request. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from featcache.errors import DataError

_MAX_NAME = 1000  # characters


class RefusedError(DataError):
    """A request that is not served.

    Attributes:
        status: Of the HTTP response.
    """

    def __init__(
        self, status: int, what: str, *, expected: object, found: object, hint: str = ""
    ) -> None:  # fmt: skip
        super().__init__(what, expected=expected, found=found, hint=hint)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        file_bytes: Of one file.
        request_bytes: Of the body of a request, with all its files.
        waiting_bytes: Of all requests in hand; what is above gets 503.
        num_files: Of one request.
        num_requests: In hand at once; one more gets 503.
        num_connections: Open at once; one more gets 503.
        header_seconds: For the head of a request.
        body_seconds: For its body.
        work_seconds: For decoding and classifying its files.
        decode_seconds: For decoding one of them.
        drain_seconds: For all requests in hand, once the server has been asked to end.
    """

    file_bytes: int = 32 << 20
    request_bytes: int = 64 << 20
    waiting_bytes: int = 512 << 20
    num_files: int = 16
    num_requests: int = 64
    num_connections: int = 256
    header_seconds: float = 10
    body_seconds: float = 60
    work_seconds: float = 60
    decode_seconds: float = 15
    drain_seconds: float = 6


@dataclass(frozen=True)
class Upload:
    """A file of a request: the name that the client gave it, and its bytes."""

    name: str
    data: bytes


def busy(expected: str) -> RefusedError:
    """Return the error of a server that has too much to do."""
    return RefusedError(
        503, "server", expected=expected, found="too many others", hint="Try again in a second"
    )


async def read_uploads(
    headers: Mapping[str, str], stream: AsyncIterator[bytes], limits: Limits
) -> list[Upload]:
    """Return the files of a request, in their order.

    Args:
        headers: Of the request.
        stream: Its body, in chunks.
        limits: Checked while reading, whatever the headers say.

    Raises:
        RefusedError: If it is not multipart, is cut off, holds no file, or goes beyond a limit.
    """
    kind, options = parse_options_header(headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise RefusedError(
            415, "request", expected="multipart/form-data", found=headers.get("content-type"),
            hint="Send files as a form does: curl -F file=@IMAGE",
        )  # fmt: skip
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limits.request_bytes:
        raise _too_large("request", limits.request_bytes, f"{length} bytes")
    parts = _Parts(limits)
    try:
        # RFC 2046 allows 70 characters.
        parser = MultipartParser(options.get(b"boundary", b"")[:256] or b"none", parts.callbacks())
        num_bytes = 0
        async for chunk in stream:
            num_bytes += len(chunk)
            if num_bytes > limits.request_bytes:
                raise _too_large("request", limits.request_bytes, "a larger one")
            parser.write(chunk)
        parser.finalize()
    except FormParserError as error:
        raise _malformed("something else") from error
    except BaseException:
        # The traceback keeps this frame while the rest of the body is awaited: up to 64 MiB.
        parts.drop()
        raise
    if not parts.is_whole:
        raise _malformed("one that is cut off")
    if not parts.uploads:
        raise RefusedError(
            422, "request", expected="one file or more", found="none",
            hint="Send files as a form does: curl -F file=@IMAGE",
        )  # fmt: skip
    return parts.uploads


class _Parts:
    """Collects what the parser finds."""

    def __init__(self, limits: Limits) -> None:
        self.uploads: list[Upload] = []
        self.is_whole = False
        self._limits = limits
        self._begin()

    def drop(self) -> None:
        """Forget what has come."""
        self.uploads.clear()
        self._begin()

    def callbacks(self) -> Any:  # its type is known to type checkers only
        return {
            "on_part_begin": self._begin, "on_header_field": self._on_field,
            "on_header_value": self._on_value, "on_header_end": self._on_header,
            "on_headers_finished": self._on_headers, "on_part_data": self._on_data,
            "on_part_end": self._on_part, "on_end": self._on_end,
        }  # fmt: skip

    def _begin(self) -> None:
        self._name: str | None = None
        self._field, self._value, self._data = bytearray(), bytearray(), bytearray()

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(self._value.decode("latin-1"))
            if (name := options.get(b"filename")) is not None:
                self._name = name.decode("utf-8", "replace")[:_MAX_NAME]
        self._field, self._value = bytearray(), bytearray()

    def _on_headers(self) -> None:
        # Of files and other fields alike: each costs memory.
        if len(self.uploads) == self._limits.num_files and self._name is not None:
            raise RefusedError(
                413, "request", expected=f"at most {self._limits.num_files} files", found="more",
                hint="Send them in several requests",
            )  # fmt: skip

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:  # a field without a file: not used
            return
        self._data += data[start:end]
        if len(self._data) > self._limits.file_bytes:
            raise _too_large("file", self._limits.file_bytes, "a larger one")

    def _on_part(self) -> None:
        # A form whose file was not chosen sends an empty one without a name.
        if self._name is not None and (self._name or self._data):
            self.uploads.append(Upload(self._name, bytes(self._data)))
        self._begin()

    def _on_end(self) -> None:
        self.is_whole = True


def _too_large(what: str, num_bytes: int, found: str) -> RefusedError:
    return RefusedError(413, what, expected=f"at most {num_bytes:,} bytes", found=found)


def _malformed(found: str) -> RefusedError:
    return RefusedError(400, "request", expected="a whole multipart/form-data body", found=found)
