"""Read what others made: regular files only, and JSON and names within stated limits.

Caches, runs, unfinished extractions and sweeps may come from strangers, or be damaged. Every JSON
text among them is read by ``parse_json`` alone, and every name is checked by ``find_fault`` where
it comes in, so that nothing behind these doors meets a value that it cannot print, write or use.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

MAX_DEPTH = 64
"""Levels of lists and objects. What featcache writes has five; Python's own parser fails at 990."""

MAX_TEXT = 1 << 20
"""Characters of a name, and of a text or key in JSON."""

MAX_PIXELS = 2**28
"""By default, images of more pixels are refused unread: a 20 kB PNG can hold 480 MB of pixels."""

_INTEGERS = range(-(1 << 63), 1 << 64)  # what 64 bits hold, signed or not
_SURROGATE = re.compile("[\ud800-\udfff]")
# U+DC80 to U+DCFF stand for the bytes of a name that is not UTF-8 (PEP 383).
_HALF_A_CHARACTER = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def parse_json(data: bytes | str) -> Any:
    """Return the value of a JSON text that somebody else may have written.

    Whole numbers fit into 64 bits, signed or not; other numbers are finite. Texts and keys have at
    most ``MAX_TEXT`` characters, no NUL and no lone surrogate but those of names that are not
    UTF-8; no key stands twice in an object; nothing is nested deeper than ``MAX_DEPTH``.

    Raises:
        ValueError: If it is not JSON, or breaks a limit; the message says which, in a few words.
    """
    try:
        text = data if isinstance(data, str) else data.decode().removeprefix("\ufeff")
        value = json.loads(
            text, parse_int=_parse_integer, parse_float=_parse_float,
            parse_constant=_refuse_constant, object_pairs_hook=_unique_keys,
        )  # fmt: skip
    except UnicodeDecodeError as error:
        raise ValueError("text that is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"text that is not JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError(_too_deep()) from error
    _check_texts(value)
    return value


def parse_json_object(data: bytes | str) -> dict[str, Any]:
    """Return a JSON object that somebody else may have written: see ``parse_json``.

    Raises:
        ValueError: If it is no object, not JSON, or breaks a limit.
    """
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}")
    return value


def _parse_integer(digits: str) -> int:
    if len(digits) > 20 or int(digits) not in _INTEGERS:
        raise ValueError(f"the number {digits[:20]}..., beyond 64 bits")
    return int(digits)


def _parse_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]}, which is not finite")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the number {name}, which is not finite")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} twice")
    return value


def _too_deep() -> str:
    return f"lists or objects nested more than {MAX_DEPTH} deep"


def _check_texts(value: Any) -> None:
    """Check the texts and the depth, a level after the other."""
    level, depth = [value], 0
    while level:
        following: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                for key in item:
                    _check_text(key)
                following += item.values()
            elif isinstance(item, list):
                following += item
        level, depth = following, depth + 1
        if depth > MAX_DEPTH + 1:
            raise ValueError(_too_deep())


def _check_text(text: str) -> None:
    if fault := find_fault(text):
        raise ValueError(fault)


def find_fault(name: str, *, is_class: bool = False) -> str | None:
    """Return why a name cannot be used, in a few words; None if it can.

    Args:
        name: Of an image, a group or a class. Bytes that are not UTF-8 stand in it as the
            surrogates U+DC80 to U+DCFF.
        is_class: Of a class: those are written in full into CSV headers and figures, so they have
            no surrogates at all.
    """
    if "\0" in name:
        return f"a NUL in {name[:40]!r}"
    if len(name) > MAX_TEXT:
        return f"a text of {len(name):,} characters"
    if name.isascii():
        return None
    if is_class and _SURROGATE.search(name):
        return f"a name that is not UTF-8, {name[:40]!r}"
    if _HALF_A_CHARACTER.search(name):
        return f"half a character (a lone surrogate) in {name[:40]!r}"
    return None


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file for reading; refuse anything else at once.

    Opening a pipe would block for ever, and opening some devices does things.

    Raises:
        OSError: If there is none, or it cannot be read; "not a regular file" for a pipe, a device,
            a socket or a loop of links.
    """
    try:
        if not _is_plain(path.stat()):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = io.FileIO(os.open(path, flags))
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, "a name that no file can have") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.EINVAL, "not a regular file", str(path)) from error
        raise
    if not _is_plain(os.fstat(file.fileno())):  # replaced since
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


_LASTING = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG,
    errno.ENAMETOOLONG,
}  # fmt: skip


def reading_hint(error: OSError, otherwise: str) -> str:
    """Return what to do about a file that could not be read, for a message.

    Errors of a disk or a network may pass: nothing should be given up for them before the same
    command was tried again.

    Args:
        error: What reading the file raised.
        otherwise: What to do about a file that is not there, or is no file: a sentence without its
            full stop, or nothing.
    """
    if error.errno in {errno.EACCES, errno.EPERM}:
        return "Check its permissions"
    if error.errno in _LASTING:
        return otherwise
    again = "Run the same command again"
    if not otherwise:
        return again
    return f"{again}. If that does not help, {otherwise[0].lower()}{otherwise[1:]}"


def _is_plain(status: os.stat_result) -> bool:
    """Return whether it is a regular file; raise for a folder, whose own error says more."""
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    return stat.S_ISREG(status.st_mode)


def real_path(path: Path) -> Path:
    """Return a path with its links followed, as far as they lead anywhere.

    ``Path.resolve`` raises RuntimeError for a loop of links before Python 3.13.
    """
    return Path(os.path.realpath(path))


def is_within(path: Path, folder: Path) -> bool:
    """Return whether a path is a folder or leads into it, through links or in another case too."""
    place = real_path(path)
    try:
        found = folder.stat()
    except OSError:  # nothing is there yet
        return place.is_relative_to(real_path(folder))
    for one in (place, *place.parents):
        with contextlib.suppress(OSError):
            if os.path.samestat(found, one.stat()):
                return True
    return False


def why_no_file(path: Path, missing: str = "no such file") -> str | None:
    """Return why a path leads to no regular file, in a few words; None if it leads to one.

    Args:
        path: The path.
        missing: What to return where there is nothing.
    """
    try:
        return None if _is_plain(path.stat()) else "not a regular file"
    except ValueError:
        return "a name that no file can have"
    except OSError as error:
        reasons = {errno.ELOOP: "not a regular file", errno.EISDIR: "a folder"}
        is_missing = error.errno in {errno.ENOENT, errno.ENOTDIR}
        return missing if is_missing else reasons.get(error.errno or 0, str(error.strerror))
