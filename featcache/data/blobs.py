"""Files that hold many images: read a stretch of one, and see whether it has changed.

Reads: local files. Writes: nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from featcache.data.remote import RemoteFile
from featcache.untrusted import open_regular

ReadAt = Callable[[int, int], bytes]
"""(offset, number of bytes) -> those bytes, or fewer at the end of the file."""

_CHANGED = "the file has changed since it was scanned"


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine, as it was when it was listed. Keeps nothing open.

    Args:
        path: Where it is.
        num_bytes: Its size.
        mtime_ns: Time of its last change.
    """

    path: Path
    num_bytes: int
    mtime_ns: int

    def as_json(self) -> dict[str, Any]:
        """Return its fields as JSON values, for another process."""
        return {"path": os.fspath(self.path.absolute()), "num_bytes": self.num_bytes,
                "mtime_ns": self.mtime_ns}  # fmt: skip

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return str(self.path)

    def absolute(self) -> LocalFile:
        """Return it for processes that have another current folder."""
        return replace(self, path=self.path.absolute())

    @classmethod
    def of(cls, path: Path) -> LocalFile:
        """Return the file at a path.

        Raises:
            OSError: If there is none, or it is no regular file.
        """
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
        return cls(path, status.st_size, status.st_mtime_ns)

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open it for reading.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it has another size or time than when it was listed.
        """
        with open_regular(self.path) as opened, io.BufferedReader(opened) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (self.num_bytes, self.mtime_ns):
                raise ValueError(_CHANGED)
            yield file

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return a stretch of it.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it has changed since it was listed, or ends before.
        """
        with self.open() as file:
            data = read_at(file, offset, num_bytes)
        if len(data) != num_bytes:
            raise ValueError(_CHANGED)
        return data


Blob = LocalFile | RemoteFile
"""A file that holds images, here or in a store."""


def blob_from_json(stored: Mapping[str, Any]) -> Blob:
    """Return what ``as_json`` made."""
    if "url" in stored:
        return RemoteFile(stored["url"], stored["num_bytes"], stored["tag"])
    return LocalFile(Path(stored["path"]), stored["num_bytes"], stored["mtime_ns"])


def read_at(file: BinaryIO, offset: int, num_bytes: int) -> bytes:
    """Return a stretch of an open file, fewer bytes only at its end."""
    file.seek(offset)
    data = file.read(num_bytes)
    while len(data) < num_bytes and (more := file.read(num_bytes - len(data))):
        data += more
    return data
