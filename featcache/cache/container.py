"""The container: named arrays in one file, read by a table and without libhdf5.

The file begins with a **user block** (4,096 bytes, or the next power of two that fits), which every
HDF5 reader skips. It holds one zero-padded JSON object: ``format``, ``format_version``,
``user_block_bytes``, ``payload_bytes``, ``payload_sha256``, ``content_sha256``, ``fingerprint``,
``user_block_sha256`` (of the canonical JSON of the others) and ``arrays``: name, offset from the
start of the file, shape and dtype of every data set, and the ``crc32`` of some. (Without its own
hash, 35 of 2,000 random damages to the block renamed or moved an array unnoticed.) After it comes
an ordinary HDF5 file of contiguous, unfiltered, fixed-width data sets (module ``hdf5``).

Reading uses only the table, which is checked against the length of the file. Of 39,000 damaged HDF5
files, libhdf5 read 4,765 as other data without an error, hung on 8 and crashed on 2.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from featcache.cache.row_reader import RowReader
from featcache.errors import CacheError
from featcache.files import canonical_json, json_sha256, sha256_stream
from featcache.formatting import join_few
from featcache.untrusted import open_regular, parse_json_object, reading_hint

FORMAT = "featcache"
FORMAT_VERSION = 1
MIN_USER_BLOCK_BYTES = 4096
MAX_USER_BLOCK_BYTES = 1 << 20

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_USER_BLOCK_SIZES = {1 << power for power in range(12, 21)}
_UNREADABLE = "an unreadable user block"
_KEYS = {
    "format", "format_version", "user_block_bytes", "payload_bytes", "payload_sha256",
    "content_sha256", "fingerprint", "arrays",
}  # fmt: skip
_DTYPE = re.compile(r"<f4|<f2|<i8|\|u1|\|S[1-9][0-9]{0,6}")
_NAME = re.compile(r"[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)*")


@dataclass(frozen=True)
class ArrayEntry:
    """An entry of the table: where an array is in the file, its shape and dtype."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    crc32: int | None = None
    """Checksum of its bytes; None if the table has none."""

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class ArrayReader(RowReader):
    """Reads rows of one array of a container on demand.

    Args:
        container: The open container.
        name: Name of the array.
        as_vectors: Read (N, V, D) as (N * V, D).
    """

    def __init__(self, container: Container, name: str, *, as_vectors: bool = False) -> None:
        entry = container.entry(name)
        shape, self.path = entry.shape, container.path
        if as_vectors:
            shape = (math.prod(shape[:-1]), shape[-1])
        super().__init__(container._reopen, entry.offset, shape, entry.dtype, container._unreadable)


@dataclass(frozen=True)
class Container:
    """An open container: the contents of the user block. Holds no file handle."""

    path: Path
    fingerprint: str
    payload_sha256: str
    content_sha256: str
    user_block_bytes: int
    payload_bytes: int
    arrays: Mapping[str, ArrayEntry]
    stamp: tuple[int, ...] = field(compare=False, repr=False)
    """Identifies the file: device, inode, size, time of change."""

    def map(self, name: str) -> npt.NDArray[Any]:
        """Return the array memory-mapped, read-only: data is read when it is used.

        Where the file system maps no files, it is read at once.
        """
        entry = self.entry(name)
        if entry.num_bytes == 0:
            return np.empty(entry.shape, entry.dtype)
        # Map only the pages of this array: ulimit -v counts everything that is mapped.
        start = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
        size = entry.offset - start + entry.num_bytes
        with self._reopen() as file:
            try:
                view = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=start)
            except OSError:  # ENODEV: a file system that maps no files (vboxsf, some of FUSE)
                array = self.read(name)
                array.flags.writeable = False
                return array
        flat = np.frombuffer(view, entry.dtype, math.prod(entry.shape), entry.offset - start)
        return flat.reshape(entry.shape)

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read the whole array into memory."""
        entry = self.entry(name)
        array: npt.NDArray[Any] = np.empty(entry.shape, entry.dtype)
        if entry.num_bytes:
            ArrayReader(self, name).read_into(array)
        return array

    def _reopen(self) -> io.FileIO:
        try:
            file = open_regular(self.path)
        except FileNotFoundError as error:
            raise self._changed("no such file") from error
        except OSError as error:
            raise self._unreadable(error) from error
        if _identify_file(file.fileno()) != self.stamp:
            file.close()
            raise self._changed()
        return file

    def entry(self, name: str) -> ArrayEntry:
        """Return the table's entry of an array.

        Raises:
            CacheError: If there is none.
        """
        if name not in self.arrays:
            raise CacheError(
                "cache", expected=f"a data set {name}", found=", ".join(self.arrays),
                where=self.path, hint="Extract it again",
            )  # fmt: skip
        return self.arrays[name]

    def is_current(self) -> bool:
        """Return whether the file of this name is still the one that was opened."""
        with contextlib.suppress(CacheError):
            self._reopen().close()
            return True
        return False

    def _changed(self, found: str = "another one under its name") -> CacheError:
        return CacheError(
            "cache", expected="the file that was opened", found=found, where=self.path,
            hint="Open it again",
        )  # fmt: skip

    def _unreadable(self, error: OSError | None) -> CacheError:
        if error is None:
            return self._changed("one that was cut off meanwhile")
        return CacheError(
            "cache", expected="a file that can be read", found=error.strerror or error,
            where=self.path, hint=reading_hint(error, "Copy it again"),
        )  # fmt: skip


def open_container(path: Path, *, verify: bool = True) -> Container:
    """Read the user block of ``path`` and check it against the file.

    Args:
        path: The file.
        verify: Also compare the payload's sha256 (reads the whole file once).

    Raises:
        CacheError: If it is not a featcache file, of a newer version, truncated or damaged.
    """
    try:
        with io.BufferedReader(open_regular(path)) as file:
            stamp = _identify_file(file.fileno())
            text = _read_user_block(file, path)
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        expected, hint = "a readable file", reading_hint(error, "Make it with featcache extract")
        if path.is_dir():
            expected, found = "a cache, which is a file", "a folder"
            hint = hint_of_folder(path) or hint
        raise CacheError("cache", expected=expected, found=found, where=path, hint=hint) from error
    container = _parse(text, path, stamp)
    if verify:
        check_payload(container)
    return container


def hint_of_folder(path: Path) -> str:
    """Return what to name in place of a folder, for a message; nothing if it has no cache or run.

    ``extract`` makes a folder of caches for several backbones or sizes.
    """
    inside = sorted(path.glob("*.h5")) if path.is_dir() else []
    if inside:
        listed = join_few(file.as_posix() for file in inside)
        return f"Name one of its caches: {listed}" if len(inside) > 1 else f"Name {listed}"
    if (path / "run.json").is_file():
        return "It is a run: name the cache that it was trained on, which featcache info tells"
    return ""


def is_container(path: Path) -> bool:
    """Return whether ``path`` was written by featcache: any version, damaged or not."""
    try:
        with io.BufferedReader(open_regular(path)) as file:
            head = file.read(MAX_USER_BLOCK_BYTES + len(_HDF5_SIGNATURE))
    except OSError:
        return False
    is_hdf5 = any(head.startswith(_HDF5_SIGNATURE, size) for size in _USER_BLOCK_SIZES)
    return is_hdf5 and b'"format":"featcache"' in head


def content_sha256(digests: Mapping[str, tuple[np.dtype[Any], tuple[int, ...], str]]) -> str:
    """Return one hash of several arrays: of the list [name, dtype, shape, sha256], sorted by name.

    Args:
        digests: Name -> dtype, shape and sha256 of the array's bytes.
    """
    lines = [[name, dtype.str, list(shape), sha] for name, (dtype, shape, sha) in digests.items()]
    return hashlib.sha256(canonical_json(sorted(lines)).encode()).hexdigest()


def is_payload_whole(container: Container) -> bool:
    """Return whether the bytes after the user block match ``payload_sha256``."""
    with container._reopen() as file:  # an update may have replaced the file
        file.seek(container.user_block_bytes)
        try:
            return sha256_stream(file) == container.payload_sha256
        except OSError as error:
            raise container._unreadable(error) from error


def check_payload(container: Container) -> None:
    """Check that the bytes after the user block match ``payload_sha256``.

    Raises:
        CacheError: If not: the file was damaged after it was written.
    """
    if not is_payload_whole(container):
        raise CacheError(
            "cache", expected=f"payload sha256 {container.payload_sha256[:16]}...",
            found="another", where=container.path,
            hint="The file is damaged: copy it again, or let featcache verify say where",
        )  # fmt: skip


def _read_user_block(file: BinaryIO, path: Path) -> str:
    head = file.read(MIN_USER_BLOCK_BYTES)
    if not head.startswith(b"{"):
        kind = "an HDF5 file without featcache's user block" if b"\x89HDF" in head else "other data"
        raise _not_a_cache(path, kind if head else "an empty file")
    if b"\0" not in head:
        head += file.read(MAX_USER_BLOCK_BYTES - len(head))
    try:
        return str(head.split(b"\0", 1)[0].decode("ascii"))
    except UnicodeDecodeError as error:
        raise _not_a_cache(path, _UNREADABLE) from error


def _not_a_cache(path: Path, found: str) -> CacheError:
    hint = "Caches are made by featcache extract or featcache.write_cache"
    if found.startswith(_UNREADABLE):
        hint = "If it was a cache, it is damaged: copy it again, or run featcache extract --rebuild"
    return CacheError("cache", expected="a featcache file", found=found, where=path, hint=hint)


def _identify_file(handle: int) -> tuple[int, ...]:
    status = os.fstat(handle)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def user_block_sha256(block: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical JSON of the user block without its own hash."""
    return json_sha256(block, without="user_block_sha256")


def _is_signed(block: Mapping[str, Any]) -> bool:
    """Return whether the block's own hash is right; other writers of format 1 may leave it out."""
    if set(block) == _KEYS:
        return True
    return user_block_sha256(block) == block.get("user_block_sha256")


def _parse(text: str, path: Path, stamp: tuple[int, ...]) -> Container:
    """Build a Container from the user block, after checking all of it against the file."""
    size = stamp[2]

    def damaged(what: str, expected: object, found: object) -> CacheError:
        return CacheError(
            f"cache, {what}", expected=expected, found=found, where=path,
            hint="The file is damaged: copy it again, or run featcache extract --rebuild",
        )  # fmt: skip

    try:
        block = parse_json_object(text)
    except ValueError as error:
        raise _not_a_cache(path, f"{_UNREADABLE}: {error}") from error
    if block.get("format") != FORMAT:
        raise _not_a_cache(path, "another format")
    version = block.get("format_version")
    if type(version) is not int or version < 1:
        raise damaged("format_version", "a whole number from 1", version)
    if version > FORMAT_VERSION:
        raise CacheError(
            "cache", expected=f"format version {FORMAT_VERSION}", found=f"version {version}",
            where=path, hint="A newer featcache wrote it: upgrade with pip install -U featcache",
        )  # fmt: skip
    if not _is_signed(block):
        raise damaged("user block", "its own sha256", "another")
    start, payload = block.get("user_block_bytes"), block.get("payload_bytes")
    if type(start) is not int or start not in _USER_BLOCK_SIZES:
        raise damaged("user_block_bytes", "a power of two from 4096", start)
    if type(payload) is not int or start + payload != size:
        raise damaged("length", f"{start} + {payload} bytes", f"{size} bytes")
    hashes = [block.get(k) for k in ("fingerprint", "payload_sha256", "content_sha256")]
    if not all(isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) for v in hashes):
        raise damaged("hashes", "64 hex digits", repr(hashes)[:80])
    try:
        entries = [_parse_entry(line, start, size) for line in block["arrays"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged("table of arrays", "names, offsets, shapes and dtypes", error) from error
    if len({e.name for e in entries}) != len(entries):
        raise damaged("table of arrays", "each name once", "a name twice")
    spans = sorted((e.offset, e.offset + e.num_bytes, e.name) for e in entries if e.num_bytes)
    for (_, end, name), (following, _, other) in pairwise(spans):
        if end > following:
            raise damaged("table of arrays", "arrays side by side", f"{name} runs into {other}")
    fingerprint, payload_sha256, content_sha256 = map(str, hashes)
    return Container(
        path, fingerprint, payload_sha256, content_sha256, start, payload,
        {e.name: e for e in entries}, stamp,
    )  # fmt: skip


def _parse_entry(line: Any, start: int, size: int) -> ArrayEntry:
    name, offset, shape, dtype = line["name"], line["offset"], line["shape"], line["dtype"]
    if not _NAME.fullmatch(name) or not _DTYPE.fullmatch(dtype):
        raise ValueError(f"{name!r:.80} of dtype {dtype!r:.80}")
    if len(shape) > 3 or any(type(n) is not int or not 0 <= n <= size for n in shape):
        raise ValueError(f"{name} of shape {shape!r:.80}")
    crc32 = line.get("crc32")
    if crc32 is not None and (type(crc32) is not int or not 0 <= crc32 < 1 << 32):
        raise ValueError(f"{name} of crc32 {crc32!r:.80}")
    entry = ArrayEntry(name, offset, tuple(shape), np.dtype(dtype), crc32)
    if type(offset) is not int or offset < start or offset + entry.num_bytes > size:
        raise ValueError(f"{name} at {offset!r:.80}, outside the file")
    return entry
