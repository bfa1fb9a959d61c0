"""Windows' rules for files, played on Linux: what is open is neither replaced nor removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def _locking(handle: int, mode: str, num_bytes: int) -> None:
    """Stand for ``msvcrt.locking``: a byte far beyond the end may be locked."""
    assert num_bytes == 1
    assert os.lseek(handle, 0, os.SEEK_CUR) > 1 << 20  # locked bytes cannot be read
    how = {"lock": fcntl.LOCK_EX | fcntl.LOCK_NB, "unlock": fcntl.LOCK_UN}[mode]
    try:
        fcntl.flock(handle, how)
    except BlockingIOError as error:
        raise PermissionError(errno.EACCES, "Permission denied") from error


def _is_open(path: Path) -> bool:
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.path.samestat(handle.stat(), os.lstat(path)):
                return True
    return False


def _unless_open(function: Callable[..., Any], num_paths: int) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        for path in map(Path, arguments[:num_paths]):
            if not options.get("dir_fd") and path.is_file() and _is_open(path):
                raise PermissionError(errno.EACCES, "used by another process", str(path))
        return function(*arguments, **options)

    return call


def _rename(source: Any, target: Any) -> None:
    """Stand for ``os.rename``, which replaces nothing on Windows."""
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "it exists already", str(source), None, str(target))
    os.replace(source, target)  # noqa: PTH105


@contextlib.contextmanager
def act_as_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let files be opened, locked, renamed and removed as on Windows; folders are not synced.

    There is no flock, no renameat2, and there are no flags but those that Windows has.
    """
    with monkeypatch.context() as patch:
        msvcrt = SimpleNamespace(locking=_locking, LK_NBLCK="lock", LK_UNLCK="unlock")
        patch.setitem(sys.modules, "msvcrt", msvcrt)
        patch.setitem(sys.modules, "fcntl", None)
        patch.setattr(sys, "platform", "win32")
        patch.setattr(os, "O_BINARY", 0, raising=False)
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "fchown", "posix_fallocate",
                     "posix_fadvise", "register_at_fork"):  # fmt: skip
            patch.delattr(os, name)
        patch.delattr(signal, "SIGHUP")
        patch.setattr(os, "replace", _unless_open(os.replace, 2))
        patch.setattr(os, "rename", _unless_open(_rename, 2))
        patch.setattr(os, "unlink", _unless_open(os.unlink, 1))
        yield
