"""A journal: what was done so far, one JSON object a line, so that a killed program can go on.

The first line says what the work is; every other is an entry, synced before it counts. A kill can
only tear the last line, which is then left out. Preferred to a data base: an entry is one write,
and nothing in it is ever half done.

Reads and writes: a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcache.errors import ConfigError, printable
from featcache.files import (
    canonical_json,
    disk_error,
    read_regular,
    sync_file,
    sync_folder,
    write_bytes,
)
from featcache.untrusted import parse_json, parse_json_object, reading_hint

_MAX_BYTES = 1 << 30


class Journal:
    """A journal, resumed or begun.

    Args:
        path: The file.
        work: What the work is, a JSON object: ``format``, and all that decides the entries.
        name: What is unfinished, for messages.

    Attributes:
        entries: Those that are there, in order.

    Raises:
        ConfigError: If the file has entries of other work (says of which), or is no journal.
    """

    def __init__(
        self, path: Path, work: Mapping[str, Any], name: str = "an unfinished sweep"
    ) -> None:
        self._path, self._name = path, name
        self.entries: list[Any] = []
        lines = _read_lines(path)
        if not lines:
            write_bytes(path, _line(work))
            return
        try:
            found, *self.entries = [parse_json_object(line) for line in lines]
        except ValueError as error:
            raise self.damaged(error) from error
        if found.get("format") != work.get("format"):
            raise self.damaged("that of something else")
        if self.entries:
            self._compare(parse_json(canonical_json(work)), found)
        else:  # nothing would be lost
            write_bytes(path, _line(work))

    def damaged(self, found: object) -> ConfigError:
        """Return the error for a journal, or an entry of it, that is not what was written."""
        return _damaged(self._path, found, name=self._name)

    def _compare(self, work: Any, found: dict[str, Any]) -> None:
        keys = [key for key in sorted({*work, *found}) if work.get(key) != found.get(key)]
        if keys:
            begun, now = (
                ", ".join(f"{key} {_brief(side.get(key))}" for key in keys)
                for side in (found, work)
            )
            raise ConfigError(
                self._name, expected=f"the command that began it: {begun}", found=now,
                where=self._path, hint=f"Repeat that command; {_begin_anew(self._path)}",
            )  # fmt: skip

    def append(self, entry: Any) -> None:
        """Add an entry; it is there for good when this returns.

        Raises:
            CacheError: If the disk is full.
        """
        line = _line(entry)
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                sync_file(file.fileno(), self._path)
        except OSError as error:
            raise disk_error(error, self._path, len(line)) from error
        self.entries.append(parse_json(line))


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what the work of a journal is, and its entries; change nothing.

    Raises:
        ConfigError: If the file cannot be read or is no journal.
    """
    data = _read(path)
    try:
        work, *entries = [parse_json_object(line) for line in data.split(b"\n")[:-1]]
    except ValueError as error:
        raise _damaged(path, error) from error
    return work, entries


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_lines(path: Path) -> list[bytes]:
    """Return the whole lines; what a kill left behind them is cut off."""
    data = _read(path)
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("rb+") as file:
            file.truncate(len(whole))
            sync_file(file.fileno(), path)
        sync_folder(path.parent)
    return whole.splitlines()


def _line(value: Any) -> bytes:
    return canonical_json(value).encode() + b"\n"


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _damaged(
    path: Path, found: object, hint: str = "It cannot be resumed", name: str = "an unfinished sweep"
) -> ConfigError:
    return ConfigError(
        name, expected="its journal", found=found, where=path,
        hint=f"{hint}; {_begin_anew(path)}",
    )  # fmt: skip


def _unreadable(path: Path, error: OSError) -> ConfigError:
    hint = reading_hint(error, "It cannot be resumed")
    return _damaged(path, error.strerror, hint)


def _begin_anew(path: Path) -> str:
    return f"to begin anew, remove the folder {printable(path.parent.name)}"
