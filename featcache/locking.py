"""The writer's lock: one process at a time writes a cache or a run; it is freed when it dies.

The lock file also marks a folder of unfinished work as ours: ``OUTPUT.partial/lock``.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from featcache.errors import CacheError
from featcache.files import NO_SPACE, disk_error, sync_folder

LOCK_NAME = "lock"


@contextlib.contextmanager
def folder_lock(folder: Path, what: str, own_names: str) -> Iterator[None]:
    """Hold the lock of a folder of unfinished work, which is made if it is missing.

    Args:
        folder: The folder, ``OUTPUT.partial`` as a rule.
        what: What is written, for messages.
        own_names: Regular expression of the names in it that are ours, all others being left alone.
            Files of these names without a lock file are somebody else's.

    Raises:
        CacheError: If another process holds the lock, or the folder is somebody else's.
    """
    refuse_strangers(folder, what, own_names)
    was_held = False
    try:
        with writer_lock(folder / LOCK_NAME, what):
            was_held = True
            sync_folder(folder)  # a power cut must not leave our files without their lock
            yield
    finally:
        # Windows removes no open file: ``remove_lock`` could not, and cannot remove that of the
        # next writer.
        if was_held and sys.platform == "win32":
            remove_lock_alone(folder)


def refuse_held(folder: Path, what: str, *, needs_locks: bool = True) -> None:
    """Refuse, before any work is done, a folder of unfinished work that another process writes.

    Args:
        folder: The folder.
        what: What is written, for messages.
        needs_locks: Refuse a file system without locks too.

    Raises:
        CacheError: If another process holds its lock.
    """
    path = folder / LOCK_NAME
    if not path.is_file():
        return
    # For writing too: NFS locks no file that is open for reading alone. An error the writer tells.
    with contextlib.suppress(OSError), path.open("rb+", buffering=0) as file:
        try:
            _lock(file, path, what)
        except CacheError as error:
            if needs_locks or isinstance(error.__cause__, BlockingIOError):
                raise
        else:
            _unlock(file)


def remove_lock(folder: Path) -> None:
    """Remove the lock file of a folder, and the folder if it is empty; call it under the lock."""
    with contextlib.suppress(OSError):
        sync_folder(folder)  # what was removed before it must not come back without it
        (folder / LOCK_NAME).unlink(missing_ok=True)
        folder.rmdir()


def remove_lock_alone(folder: Path) -> None:
    """Remove the lock file and the folder where nothing else is in it."""
    if [path.name for path in folder.iterdir()] == [LOCK_NAME]:
        remove_lock(folder)


def refuse_strangers(folder: Path, what: str, own_names: str) -> None:
    """Refuse a folder of unfinished work that we did not make: see ``folder_lock``.

    Raises:
        CacheError: If it is a link or a file, or has files of our names and no lock file.
    """
    found = ""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        found = f"{folder.name}, which is a link or a file"
    elif folder.is_dir() and not os.path.lexists(folder / LOCK_NAME):
        names = sorted(path.name for path in folder.iterdir())
        theirs = [name for name in names if re.fullmatch(own_names, name, re.DOTALL)]
        found = f"{folder.name} of somebody else, with {theirs[0]} in it" if theirs else ""
    if found:
        raise CacheError(
            f"place to write {what}", expected="nothing there, or our own unfinished work",
            found=found, where=folder.parent, hint="Remove or rename it, or choose another name",
        )  # fmt: skip


@contextlib.contextmanager
def writer_lock(path: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock on ``path``, which the system releases when the process dies.

    Args:
        path: The lock file. It is created if missing, and may be left behind.
        what: What is locked, for messages.

    Raises:
        CacheError: If another process holds it (names process, host and start), or the file system
            has no locks.
    """
    while True:
        file = _open_lock(path, what)
        if file is None:  # a writer that finished has just removed the folder
            continue
        with file:
            _lock(file, path, what)
            if _is_current_file(file, path):
                _sign(file)
                try:
                    yield
                finally:
                    _unlock(file)
                return


_SIGNATURE_START = b"process "

_LOCK_BYTES = 4096  # for messages: a folder and a small file take one disk block
_LOCKED_BYTE = 1 << 30  # on Windows: nobody can read a byte that is locked, so one beyond the sign


def _open_lock(path: Path, what: str) -> BinaryIO | None:
    """Open or create the lock file; return None if its folder was removed meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent.parent)  # else a power cut could lose the folder
    except OSError as error:
        raise disk_error(error, path.parent, _LOCK_BYTES) from error
    if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise _unusable_lock(path, what, "a link")
    # Not through a link. A pipe would block until its other end opens.
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # some of them on Windows
        flags |= getattr(os, name, 0)
    try:
        handle = os.open(path, flags, 0o666)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_error(error, path, _LOCK_BYTES) from error
        raise _unusable_lock(path, what, str(error.strerror)) from error
    file = open(handle, "r+b", buffering=0)  # noqa: PTH123, SIM115 (the caller closes it)
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        file.close()
        raise _unusable_lock(path, what, "a pipe or a device")
    # The content is never synced: after a power cut it may be empty, partial or zeros.
    head = zip(file.read(len(_SIGNATURE_START)), _SIGNATURE_START, strict=False)
    if any(byte not in {0, wanted} for byte, wanted in head):
        file.close()
        raise _unusable_lock(path, what, "another file")
    return file


def _unusable_lock(path: Path, what: str, found: str) -> CacheError:
    return CacheError(
        f"lock of {what}", expected="a lock file of featcache that can be written", found=found,
        where=path, hint="Remove it, or choose another name",
    )  # fmt: skip


def _lock(file: BinaryIO | io.FileIO, path: Path, what: str) -> None:
    try:
        try:
            _try_lock(file)
        except BlockingIOError:
            # Try again after reading (which takes a while): after one of 900 kills the lock was
            # not yet free.
            holder = _read_sign(file)
            _try_lock(file)
    except BlockingIOError as error:
        raise CacheError(
            what, expected="no other writer", found=f"one at work: {holder}", where=path,
            hint="Wait for it, or stop it",
        ) from error  # fmt: skip
    except OSError as error:
        raise CacheError(
            what, expected="a file system that can lock files", found=str(error.strerror),
            where=path, hint="Write to a local disk and copy the result",
        ) from error  # fmt: skip


def _try_lock(file: BinaryIO | io.FileIO) -> None:
    """Lock an open file for this process alone.

    Raises:
        BlockingIOError: If another process has locked it.
        OSError: If the file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        file.seek(_LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(file: BinaryIO | io.FileIO) -> None:
    """Release a lock: closing the file does so too, but on Windows some time later."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


def _sign(file: BinaryIO) -> None:
    """Write who holds the lock into it. This may fail on a full disk; the lock holds anyway."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.seek(0)
    with contextlib.suppress(OSError):
        file.write(
            _SIGNATURE_START + f"{os.getpid()} on {socket.gethostname()} since {since}".encode()
        )


def _read_sign(file: BinaryIO | io.FileIO) -> str:
    """Return who holds the lock. It is signed just after it is taken, so wait up to a second."""
    for _ in range(20):
        time.sleep(0.05)
        file.seek(0)
        if holder := file.read(500).decode(errors="replace").strip():
            return holder
    return "an unknown process"


def _is_current_file(file: BinaryIO, path: Path) -> bool:
    """Return whether the open file is still the one under its name.

    The previous writer may have removed it after we opened and before we locked it. Another process
    could then lock a new file of this name, and both would write. Windows removes no open file.
    """
    if sys.platform == "win32":
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
