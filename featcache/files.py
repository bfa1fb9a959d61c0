"""Atomic writes (a file is whole or absent), hashes and canonical JSON.

The protocol is: temporary name, write, fsync, rename, fsync of the folder. With it 1,500 of 1,500
kills and 300 of 300 power cuts lost nothing; without the last fsync 41 of 60 cuts lost a file.

What a verb may write over is decided in module ``outputs``; names and renames are in ``renames``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from featcache.errors import CacheError, ConfigError, name_urls
from featcache.renames import NOT_SUPPORTED, beside
from featcache.untrusted import open_regular, parse_json_object, real_path

_HASH_BLOCK_BYTES = 1 << 20
_NO_FOLDER_SYNC = NOT_SUPPORTED | {
    errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR, errno.EROFS
}  # fmt: skip
NO_SPACE = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}
"""Error numbers of a disk that is full, or of a limit on file sizes."""


def canonical_json(value: Any) -> str:
    """Return ``value`` as canonical JSON: sorted keys, no spaces, ASCII, no NaN.

    Equal values give equal bytes, so the text can be hashed.

    Raises:
        ValueError: If ``value`` holds NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_sha256(value: Mapping[str, Any], *, without: str) -> str:
    """Return the sha256 (64 hex digits) of ``value`` as canonical JSON, one key left out.

    The key is usually where the hash itself is stored.

    Raises:
        ValueError: If ``value`` holds NaN or an infinity.
    """
    rest = {key: item for key, item in value.items() if key != without}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def result_as_dict(result: Any) -> dict[str, Any]:
    """Return a dataclass as JSON values: objects by field, tuples as lists, ``/`` in paths."""
    return {f.name: _json_value(getattr(result, f.name)) for f in dataclasses.fields(result)}


def _json_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return result_as_dict(value)
    if isinstance(value, Mapping):
        return {key: _json_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(part) for part in value]
    if isinstance(value, PurePath | str):
        return name_urls(value if isinstance(value, str) else value.as_posix())
    return value


def readable_json(value: Any) -> str:
    """Return ``value`` as indented JSON, without NaN, ending in a newline.

    A list of numbers is one line: of a confusion matrix each row.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    return _NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)


_NUMBERS = re.compile(r"\[\n\s+(-?\d[-\d.e+,\s]*?)\n\s*\]")  # no string holds a line's end


def sha256_file(path: Path, offset: int = 0) -> str:
    """Return the sha256 (64 hex digits) of the file from byte ``offset`` to its end."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return sha256_stream(file)
    except OSError as error:
        error.filename = str(path)  # an error of reading has none
        raise


def sha256_stream(file: BinaryIO | io.FileIO) -> str:
    """Return the sha256 (64 hex digits) of the rest of an open file."""
    digest = hashlib.sha256()
    while block := file.read(_HASH_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def read_regular(path: Path, *, max_bytes: int) -> bytes:
    """Return the bytes of a regular file; refuse pipes, devices and files that are too large.

    Raises:
        OSError: If it cannot be read, is no regular file, or is larger than ``max_bytes``.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            raise OSError(errno.EFBIG, f"{num_bytes:,} bytes, more than {max_bytes:,}")
        try:
            return file.read()
        except OSError as error:
            error.filename = str(path)
            raise


def optional_json_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one if it cannot be read or holds no other."""
    try:
        return parse_json_object(read_regular(path, max_bytes=max_bytes))
    except (OSError, ValueError):
        return {}


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that its names survive a power cut.

    Does nothing where folders cannot be opened or synced: on Windows, on file systems of networks
    and of virtual machines (CIFS before Linux 4.17, vboxsf, DrvFs, some of FUSE), and in folders
    that one may write but not read.
    """
    if sys.platform == "win32":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            error.filename = str(folder)
            raise


def sync_file(handle: int, path: Path) -> None:
    """Sync an open file, so that its content survives a power cut, where the file system can.

    Raises:
        OSError: If the disk fails; names ``path``.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            error.filename = str(path)
            raise


def set_mode(path: Path, mode: int) -> None:
    """Set the permissions of a file or folder, where the file system has any (vfat, CIFS)."""
    with contextlib.suppress(OSError):
        path.chmod(mode)


def local_path(path: str | Path, what: str) -> Path:
    """Return a path as ``Path``; refuse a URL, which would become a local folder ``s3:``.

    Raises:
        ConfigError: If it is a URL. ``Path("s3://b/c")`` is ``s3:/b/c``, and so refused too.
    """
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/" + "/" * isinstance(path, str), text):
        text = re.sub(r":/+", "://", text, count=1)
        raise ConfigError(
            what, expected="a path of this machine", found=f"a URL, {text}",
            hint="Only images, caches and runs may be URLs: copy or mount the file",
        )  # fmt: skip
    return Path(path)


def follow_link(path: Path, what: str = "name") -> Path:
    """Return the file that a link points to, so that it is replaced and not the link.

    Raises:
        ConfigError: If links lead in a circle.
    """
    try:
        target = real_path(path) if path.is_symlink() else path
        if not target.is_symlink():
            return target
        found = "links that lead in a circle"  # ``real_path`` stops there
    except OSError as error:
        found = str(error.strerror)
    raise ConfigError(
        what, expected="a name, or a link to one", found=found, where=path,
        hint="Choose another name",
    )  # fmt: skip


def make_folder(path: Path) -> None:
    """Make a folder and its parents so that they survive a power cut; keep existing ones."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


# --------------------------------------------------------------------------------- writing files

Publish = Callable[[Path], object]
"""Gives a finished temporary file its name: see ``Output.publish``."""


@contextlib.contextmanager
def atomic_writer(path: Path, publish: Publish | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; on leaving, sync it and rename it to ``path``.

    The mode of a file that is replaced is kept. Leaving by an exception removes the temporary file
    and leaves an older ``path`` untouched.

    Args:
        path: The file, not a link.
        publish: Gives the temporary file its name. None replaces whatever has it, which is right
            in folders of our own only.
    """
    with _temporary(path) as (temporary, file):
        yield file
        _sync_and_close(file, temporary)
        if publish is None:
            temporary.replace(path)
        else:
            publish(temporary)
    sync_folder(path.parent)


def write_temporary(path: Path, data: bytes) -> Path:
    """Write a temporary file beside ``path``, sync it and return where it is."""
    with _temporary(path) as (temporary, file):
        file.write(data)
        _sync_and_close(file, temporary)
    return temporary


def _sync_and_close(file: BinaryIO, path: Path) -> None:
    file.flush()
    sync_file(file.fileno(), path)
    file.close()  # Windows renames no open file


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a temporary file beside ``path``; leaving by an exception removes it."""
    temporary, is_ours = beside(path, f".{secrets.token_hex(8)}.tmp", "."), False
    try:
        with _create(temporary, like=path) as file:
            is_ours = True
            yield temporary, file
    except BaseException as error:
        if is_ours or not isinstance(error, FileExistsError):  # Ctrl-C after it was created
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in {None, str(temporary)}:
            error.filename = str(path)  # nobody knows the temporary name
        raise


def _create(temporary: Path, *, like: Path) -> BinaryIO:
    """Create a file, through no link, with the mode and owner of ``like`` if that is there."""
    old = like.lstat() if os.path.lexists(like) else None
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(temporary, flags, mode)
    file = open(handle, "wb")  # noqa: PTH123, SIM115 (of a handle; the caller closes it)
    if old is not None and sys.platform != "win32":
        with contextlib.suppress(OSError):  # only root may give files away
            os.fchown(handle, old.st_uid, old.st_gid)
        with contextlib.suppress(OSError):  # no such modes on vfat and CIFS
            os.fchmod(handle, mode)
    return file


def disk_error(error: OSError, path: Path, wanted_bytes: int) -> CacheError:
    """Turn an ``OSError`` while writing into an error that says what to do."""
    if error.errno == errno.EFBIG:
        return CacheError(
            "file size", expected=f"{wanted_bytes:,} bytes", found="a limit below that",
            where=path, hint="Raise it (ulimit -f), or write to a disk that takes larger files",
        )  # fmt: skip
    if error.errno in NO_SPACE:
        free = shutil.disk_usage(path.parent).free
        return CacheError(
            "disk space", found=f"{free:,} bytes free", where=path.parent,
            # Of a folder, or a file made elsewhere, it is not known: a block more than there is.
            expected=f"{wanted_bytes or free + 4096:,} bytes",
            hint="Make room and run the same command again",
        )  # fmt: skip
    return CacheError(
        "writing", expected="a writable folder", found=str(error.strerror or error),
        where=path, hint="Check the folder and its permissions",
    )  # fmt: skip


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all: see ``atomic_writer``.

    Raises:
        CacheError: If the disk is full; says how much is needed and how much is free.
    """
    try:
        with atomic_writer(path) as file:
            file.write(data)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_error(error, path, len(data)) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON to ``path``, whole or not at all."""
    write_bytes(path, readable_json(value).encode())


def child_process(module: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment to run a module of featcache in another process.

    The current folder is not on its path: a file ``numpy.py`` beside the images must not run.
    """
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    return [sys.executable, "-P", "-m", module], {**os.environ, "PYTHONPATH": path}
