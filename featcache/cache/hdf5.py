"""The HDF5 side of a container: lay out and write the file, and compare it with libhdf5's view.

libhdf5 makes only the skeleton, in memory (3.5 KB for 100,000 rows). Plain Python writes the arrays
to their offsets, so that a full disk is an ``OSError``: libhdf5 crashed the interpreter in 29 of 32
such runs. Of caches, this is the only module that imports h5py.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.container import (
    FORMAT,
    FORMAT_VERSION,
    MAX_USER_BLOCK_BYTES,
    MIN_USER_BLOCK_BYTES,
    ArrayEntry,
    Container,
    content_sha256,
    open_container,
    user_block_sha256,
)
from featcache.files import Publish, atomic_writer, canonical_json, child_process, disk_error
from featcache.renames import NOT_SUPPORTED

_COPY_BYTES = 1 << 22
_THREAD_BYTES = 1 << 18  # see _call_in_thread
_CHECK_SECONDS = 8  # CPU time; a good file takes half a second, mostly imports
_CHECK_WAIT_SECONDS = 60  # wall time: a busy machine, a network drive
_CHECK_BYTES = 1 << 30
_MAX_OBJECTS = 1000


@dataclass(frozen=True)
class ArraySource:
    """An array to write: ``blocks`` returns its rows in C order, piece by piece."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[], Iterable[npt.NDArray[Any]]]
    crc32: int | None = None
    """Checksum for the table."""
    is_utf8: bool = False
    """Whether every value is a text in UTF-8: HDF5 has a mark for it, which h5py's asstr obeys."""

    @classmethod
    def of(cls, name: str, array: npt.NDArray[Any], crc32: int | None = None) -> ArraySource:
        """Return the source of an array in memory."""
        return cls(name, array.shape, array.dtype, lambda: [array], crc32, _is_utf8(array))

    @classmethod
    def by_blocks(
        cls, name: str, shape: tuple[int, ...], dtype: np.dtype[Any],
        blocks: Callable[[], Iterable[npt.NDArray[Any]]],
    ) -> ArraySource:  # fmt: skip
        """Return the source of an array of some rows, which is made twice: looked at, written."""
        is_utf8 = dtype.kind == "S" and all(map(_is_utf8, blocks()))
        return cls(name, shape, dtype, blocks, None, is_utf8)

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def _is_utf8(array: npt.NDArray[Any]) -> bool:
    """Return whether an array holds texts, each of them in UTF-8."""
    if array.dtype.kind != "S":
        return False
    try:  # NUL between the values: the end of one and the start of the next may make a character
        b"\0".join(array.reshape(-1).tolist()).decode()
    except UnicodeDecodeError:
        return False
    return True


class _SparseFile(io.RawIOBase):
    """A file object for libhdf5 that keeps only the bytes written to it, by offset."""

    def __init__(self) -> None:
        self.pieces: dict[int, bytes] = {}
        self.length = 0
        self._position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self.pieces[self._position] = bytes(data)
        self._position += len(data)
        self.length = max(self.length, self._position)
        return len(data)

    def readinto(self, buffer: Any) -> int:
        # libhdf5 reads nothing back while it creates a file; zeros are what a new file holds.
        buffer[:] = self.pieces.get(self._position, b"").ljust(len(buffer), b"\0")[: len(buffer)]
        self._position += len(buffer)
        return len(buffer)

    def truncate(self, size: int | None = None) -> int:
        self.length = self._position if size is None else size
        return self.length

    def flush(self) -> None:
        pass


def write_container(
    path: Path, sources: Sequence[ArraySource], fingerprint: str, content: Iterable[str],
    publish: Publish | None = None,
) -> Container:  # fmt: skip
    """Write the arrays to ``path``, whole or not at all, and return it opened.

    Args:
        path: The file to make or to replace.
        sources: The arrays; a ``/`` in a name makes an HDF5 group.
        fingerprint: sha256 of the identity, for the user block.
        content: Names of the arrays whose bytes ``content_sha256`` covers.
        publish: Gives the finished file its name: see ``files.atomic_writer``.

    Raises:
        CacheError: If the disk is full or the folder cannot be written.
    """
    user_block_bytes = MIN_USER_BLOCK_BYTES
    while True:
        skeleton, entries = _make_skeleton(sources, fingerprint, user_block_bytes)
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "user_block_bytes": user_block_bytes,
            "payload_bytes": skeleton.length - user_block_bytes,
            "payload_sha256": "0" * 64,
            "content_sha256": "0" * 64,
            "fingerprint": fingerprint,
            "user_block_sha256": "0" * 64,
            "arrays": [
                {"name": e.name, "offset": e.offset, "shape": list(e.shape), "dtype": e.dtype.str}
                | ({} if e.crc32 is None else {"crc32": e.crc32})
                for e in entries
            ],
        }
        if len(canonical_json(header)) < user_block_bytes:  # room for the zero that ends the text
            break
        user_block_bytes *= 2
    if user_block_bytes > MAX_USER_BLOCK_BYTES:
        raise ValueError(f"{len(sources)} arrays do not fit the table")
    try:
        with atomic_writer(path, publish) as file:
            _reserve(file.fileno(), skeleton.length)
            hashes = _stream(file, skeleton, sources, entries, user_block_bytes)
            covered = set(content)
            header["payload_sha256"] = hashes[""]
            header["content_sha256"] = content_sha256(
                {s.name: (s.dtype, s.shape, hashes[s.name]) for s in sources if s.name in covered}
            )
            header["user_block_sha256"] = user_block_sha256(header)
            file.seek(0)
            file.write(canonical_json(header).encode().ljust(user_block_bytes, b"\0"))
    except OSError as error:
        raise disk_error(error, path, skeleton.length) from error
    return open_container(path, verify=False)


def _make_skeleton(
    sources: Sequence[ArraySource], fingerprint: str, user_block_bytes: int
) -> tuple[_SparseFile, list[ArrayEntry]]:
    """Let libhdf5 lay out the file in memory; return its metadata and where the arrays go."""
    import h5py

    skeleton, entries = _SparseFile(), []
    # 64-byte offsets keep mapped float32 arrays aligned for vector loads.
    with h5py.File(
        skeleton, "w", userblock_size=user_block_bytes, libver=("earliest", "v110"),
        alignment_threshold=1, alignment_interval=64,
    ) as file:  # fmt: skip
        file.attrs["format"] = np.bytes_(FORMAT)
        file.attrs["format_version"] = np.int64(FORMAT_VERSION)
        file.attrs["fingerprint"] = np.bytes_(fingerprint)
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_layout(h5py.h5d.CONTIGUOUS)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        creation.set_obj_track_times(False)  # equal arrays, equal file
        groups = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        groups.set_create_intermediate_group(True)
        for source in sources:
            space = (
                h5py.h5s.create_simple(source.shape)
                if source.shape
                else h5py.h5s.create(h5py.h5s.SCALAR)
            )
            dtype = h5py.h5t.py_create(source.dtype, logical=True)
            if source.is_utf8:
                dtype.set_cset(h5py.h5t.CSET_UTF8)
            data = h5py.h5d.create(
                file.id, source.name.encode(), dtype, space, dcpl=creation, lcpl=groups
            )
            offset = data.get_offset() if source.num_bytes else user_block_bytes
            entries.append(
                ArrayEntry(source.name, offset, source.shape, source.dtype, source.crc32)
            )
    return skeleton, entries


def _reserve(handle: int, size: int) -> None:
    """Reserve the disk space, so that a full disk is noticed before any work is done."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise


def _stream(
    file: Any, skeleton: _SparseFile, sources: Sequence[ArraySource],
    entries: Sequence[ArrayEntry], start: int,
) -> dict[str, str]:  # fmt: skip
    """Write metadata and arrays in file order; return name -> sha256, "" for the payload.

    A thread computes the payload's hash, at the same time as the array's hash and the writing.
    """
    payload = hashlib.sha256()
    hashes: dict[str, str] = {}
    position = start
    file.seek(start)

    def put(data: Any, digest: Any = None) -> None:
        nonlocal position
        with _call_in_thread(payload.update, data):
            if digest is not None:
                digest.update(data)
            for i in range(0, len(data), _COPY_BYTES):
                file.write(data[i : i + _COPY_BYTES])
        position += len(data)

    parts: list[tuple[int, ArraySource | bytes]] = [*skeleton.pieces.items()]
    parts += [(e.offset, s) for e, s in zip(entries, sources, strict=True) if s.num_bytes]
    for source in sources:
        if not source.num_bytes:
            hashes[source.name] = hashlib.sha256().hexdigest()
    for offset, part in sorted(parts, key=lambda item: item[0]):
        put(b"\0" * (offset - position))
        if isinstance(part, bytes):
            put(part)
            continue
        digest = hashlib.sha256()
        for block in part.blocks():
            data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
            put(data, digest)
        hashes[part.name] = digest.hexdigest()
        if position != offset + part.num_bytes:
            raise ValueError(f"{part.name}: blocks do not add up to {part.shape}")
    put(b"\0" * (skeleton.length - position))
    hashes[""] = payload.hexdigest()
    return hashes


@contextlib.contextmanager
def _call_in_thread(function: Callable[[Any], object], data: Any) -> Iterator[None]:
    """Call ``function(data)`` in a thread during the block; at once if there are few bytes.

    Starting a thread takes 0.1 ms, enough to hash 0.2 MB; a cache has 120 small pieces.
    """
    if len(data) < _THREAD_BYTES:
        function(data)
        yield
        return
    thread = threading.Thread(target=function, args=(data,))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def compare_with_hdf5(container: Container) -> list[str]:
    """Compare the table with what libhdf5 finds in the file; return the differences.

    libhdf5 runs in a child process with limits on memory and time, as hostile files hang or crash
    it. It does not lock the file, since network file systems may refuse to and caches are replaced,
    never changed. It loads no plugins, which environment variables could name.
    """
    command, environment = child_process("featcache.cache.hdf5")
    environment |= {"HDF5_USE_FILE_LOCKING": "FALSE", "HDF5_PLUGIN_PRELOAD": "::"}
    environment |= {"OPENBLAS_NUM_THREADS": "1"}  # its threads reserve memory that is never used
    try:
        done = subprocess.run(
            [*command, str(container.path)], env=environment, capture_output=True,
            timeout=_CHECK_WAIT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [f"no answer of libhdf5 within {_CHECK_WAIT_SECONDS} s"]
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "no message"
        if -done.returncode in {getattr(signal, name, None) for name in ("SIGXCPU", "SIGKILL")}:
            reason = f"no answer within {_CHECK_SECONDS} s of computing"
        return [f"libhdf5 cannot read it (exit {done.returncode}): {reason:.200}"]
    seen = json.loads(done.stdout)
    table = {
        e.name: [e.offset if e.num_bytes else None, list(e.shape), e.dtype.str]
        for e in container.arrays.values()
    }
    differences = [
        f"/{name}: table {table.get(name)}, HDF5 {seen['arrays'].get(name)}"
        for name in sorted(table.keys() | seen["arrays"].keys())
        if table.get(name) != seen["arrays"].get(name)
    ]
    wanted = {"format": FORMAT, "fingerprint": container.fingerprint}
    differences += [
        f"attribute {key}: user block {value!r}, HDF5 {seen['attributes'].get(key)!r}"
        for key, value in wanted.items()
        if seen["attributes"].get(key) != value
    ]
    return differences


def _hdf5_view(path: str) -> dict[str, Any]:
    """Return what libhdf5 sees: the arrays' offsets, shapes, dtypes and the root's attributes.

    Only metadata is read. Only hard links are followed, and each object is visited once. The shape
    of virtual data sets is not asked for, as it may depend on other files.
    """
    import h5py

    arrays: dict[str, Any] = {}
    with h5py.File(path, "r") as file:
        names: list[str] = []

        def take(name: str) -> bool | None:
            names.append(name)
            return True if len(names) > _MAX_OBJECTS else None

        if file.visit(take):
            raise ValueError(f"more than {_MAX_OBJECTS:,} objects")
        for name in names:
            if file.get(name, getclass=True) is h5py.Dataset:
                data = file[name]
                layout = data.id.get_create_plist()
                if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_external_count():
                    arrays[name] = "stored otherwise: in chunks, in other files or virtually"
                    continue
                offset = data.id.get_offset() if data.id.get_storage_size() else None
                arrays[name] = [offset, list(data.shape), data.dtype.str]
        wanted = {key: file.attrs.get(key) for key in ("format", "fingerprint")}
        attributes = {
            key: value.decode() if isinstance(value, bytes) else str(value)
            for key, value in wanted.items()
        }
    return {"arrays": arrays, "attributes": attributes}


def _limit_resources() -> None:
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_CHECK_BYTES, _CHECK_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (_CHECK_SECONDS, _CHECK_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    _limit_resources()
    sys.stdout.write(json.dumps(_hdf5_view(sys.argv[1])))
