"""The writer's lock: one process at a time writes a cache, and its lock is free when it dies."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from featcache.errors import CacheError, ConfigError
from featcache.files import NO_SPACE, disk_error, sync_folder


@contextlib.contextmanager
def writer_lock(path: Path, what: str) -> Iterator[None]:
    """Hold ``path`` as an exclusive lock (flock), free at once when the process dies.

    Args:
        path: The lock file; it is made if missing and may stay behind, which means nothing.
        what: What is locked, for the message.

    Raises:
        CacheError: If another process holds it; says which, on what host, since when.
        ConfigError: Where the platform has no flock.
    """
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise ConfigError(
            f"writing {what}", expected="a platform with flock (Linux, macOS)", found=sys.platform,
            hint="Extract on a Linux machine; reading and training work everywhere",
        ) from error  # fmt: skip
    while True:
        file = _open_lock(path, what)
        if file is None:  # another writer, done, has just removed the folder
            continue
        with file:
            _lock(file, path, what, fcntl)
            if _is_still(file, path):
                _sign(file)
                yield
                return


_LOCK_SIGN = b"process "

_LOCK_BYTES = 4096  # a folder and a file of few bytes: what a full disk lacks


def _open_lock(path: Path, what: str) -> BinaryIO | None:
    """Open the lock file, made if missing; None if its folder was removed meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent.parent)  # what is written into it must not vanish with it
    except OSError as error:
        raise disk_error(error, path.parent, _LOCK_BYTES) from error
    try:
        # Not through a link, and not waiting for whoever may open a pipe's other end.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_error(error, path, _LOCK_BYTES) from error
        raise _not_ours(path, what, str(error.strerror)) from error
    file = open(handle, "r+b", buffering=0)  # noqa: PTH123, SIM115 (the caller closes it)
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        file.close()
        raise _not_ours(path, what, "a pipe or a device")
    # Nobody syncs it: a power cut may leave nothing, a part or zeros.
    head = zip(file.read(len(_LOCK_SIGN)), _LOCK_SIGN, strict=False)
    if any(byte not in {0, wanted} for byte, wanted in head):
        file.close()
        raise _not_ours(path, what, "another file")
    return file


def _not_ours(path: Path, what: str, found: str) -> CacheError:
    return CacheError(
        f"lock of {what}", expected="a file of ours that can be written", found=found, where=path,
        hint="Remove it, or choose another name for the cache",
    )  # fmt: skip


def _lock(file: BinaryIO, path: Path, what: str, fcntl: Any) -> None:
    how = fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            # Twice, and reading takes some time: after one of 900 kills the lock was not yet free.
            holder = _read_sign(file)
            fcntl.flock(file, how)
    except BlockingIOError as error:
        raise CacheError(
            what, expected="no other writer", found=f"one at work: {holder}", where=path,
            hint="Wait for it, or stop it",
        ) from error  # fmt: skip
    except OSError as error:
        raise CacheError(
            what, expected="a file system that can lock files", found=str(error.strerror),
            where=path, hint="Write the cache to a local disk and copy it",
        ) from error  # fmt: skip


def _sign(file: BinaryIO) -> None:
    """Note who holds the lock. On a full disk that cannot be: the lock holds all the same."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.seek(0)
    with contextlib.suppress(OSError):
        file.write(_LOCK_SIGN + f"{os.getpid()} on {socket.gethostname()} since {since}".encode())


def _read_sign(file: BinaryIO) -> str:
    """Return who holds the lock. It is signed just after it was taken, so wait a little."""
    for _ in range(20):
        time.sleep(0.05)
        file.seek(0)
        if holder := file.read(500).decode(errors="replace").strip():
            return holder
    return "an unknown process"


def _is_still(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is the one under its name.

    The writer before us may have removed it between our opening and locking it: then somebody else
    can lock the next one, and two would write.
    """
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
