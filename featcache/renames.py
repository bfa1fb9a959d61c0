"""Names beside an output, and renames that replace nothing by mistake."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any

NOT_SUPPORTED = {
    getattr(errno, name, None) for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "ENOTTY")
}
"""Error numbers of a call that a system or a file system does not have."""

_NO_RENAMEAT2 = NOT_SUPPORTED | {errno.EPERM}  # EPERM: forbidden in some containers

_MAX_NAME_BYTES = 255  # of a file's name on Linux, macOS and Windows
_WINDOWS_DEVICES = {
    "CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$",
    *(kind + number for kind in ("COM", "LPT") for number in "123456789¹²³"),
}  # fmt: skip
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # linux/fs.h
_AT_FDCWD = -100


def beside(path: Path, ending: str, start: str = "") -> Path:
    """Return the path START NAME ENDING in the same folder; a NAME too long for that is cut.

    A hash tells long names apart.
    """
    name, data = path.name, os.fsencode(path.name)
    room = _MAX_NAME_BYTES - len(start) - len(ending)
    if len(data) > room:
        digest = "~" + hashlib.sha256(data).hexdigest()[:16]
        name = data[: room - len(digest)].decode("utf-8", "ignore") + digest
    return path.with_name(start + name + ending)


def find_windows_fault(name: str) -> str | None:
    """Return why Windows cannot keep a file of this name, in a few words; None if it can.

    Some of these names would be written without an error: ``nul.csv`` into nothing, ``a.h5:b`` into
    a hidden part of ``a.h5``, and ``run.`` as ``run``.
    """
    if name.split(".", maxsplit=1)[0].rstrip().upper() in _WINDOWS_DEVICES:
        return f"{name}, the name of a device on Windows"
    if name.endswith((".", " ")):
        return f"{name!r}, whose end Windows cuts off"
    if odd := sorted({char for char in name if char in '<>:"/\\|?*' or char < " "}):
        return f"{name!r} with {odd[0]!r}, which no name has on Windows"
    return None


def ignores_case(folder: Path) -> bool:
    """Return whether a file system takes names that differ in case for one (Windows, macOS, CIFS).

    Args:
        folder: A folder that is there, with letters in its name.
    """
    other = folder.with_name(folder.name.swapcase())
    return other.name != folder.name and other.exists() and other.samefile(folder)


def is_temporary(name: str) -> bool:
    """Return whether a name is one of featcache's for temporary files."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporaries(path: Path) -> None:
    """Remove temporary files of killed writers of ``path``. Call it while holding their lock."""
    start = beside(path, f".{'0' * 16}.tmp", ".").name[: -len("0" * 16 + ".tmp")]
    for stale in sorted(path.parent.iterdir()) if path.parent.is_dir() else []:
        name = stale.name
        if is_temporary(name) and name.startswith(start) and len(name) == len(start) + 20:
            stale.unlink(missing_ok=True)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or a folder; never replace anything but an empty folder by a folder.

    Raises:
        FileExistsError: If something has that name already.
    """
    try:
        _rename_by(_RENAME_NOREPLACE, source, target)
        return
    except OSError as error:
        if error.errno not in _NO_RENAMEAT2:
            raise
    if sys.platform == "win32" or source.is_dir():
        try:
            source.rename(target)  # a folder replaces neither a file nor a folder with content
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.ENOTDIR} and os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "File exists", str(target)) from error
            raise
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # no hard links either: a window that cannot be closed
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "File exists", str(target)) from None
        source.rename(target)
    else:
        source.unlink()


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; return False where the system or the file system cannot.

    Raises:
        OSError: If one of them is not there, or it fails otherwise.
    """
    try:
        _rename_by(_RENAME_EXCHANGE, one, other)
    except OSError as error:
        if error.errno in _NO_RENAMEAT2:
            return False
        raise
    return True


@functools.cache
def _find_renameat2() -> Any:
    try:
        import ctypes

        return ctypes.CDLL(None, use_errno=True).renameat2
    except (ImportError, AttributeError, OSError, TypeError):  # macOS, an old libc, Windows
        return None


def _rename_by(flag: int, source: Path, target: Path) -> None:
    """Call Linux's ``renameat2``, which Python has not.

    Raises:
        OSError: ``ENOSYS`` or ``EINVAL`` where there is none.
    """
    renameat2 = _find_renameat2()
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(source), None, str(target))
    import ctypes

    sys.audit("os.rename", source, target, -1, -1)  # as Python's own function does
    names = os.fsencode(source), os.fsencode(target)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flag):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(target))
