"""Outputs: what a verb may write over, and how it gets its name. One rule for all verbs.

An output that is there is replaced only if its content shows that it is of the verb's own kind. A
cache and a run need their switch too, ``--rebuild`` or ``--overwrite``; a CSV needs none. Anything
else is refused, and so is a file that the same command reads. The rule is applied when a verb
begins and again when the finished file gets its name: what somebody made in the meantime stays. A
link is followed. Pipes and character devices are written into, where the verb allows it.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from featcache.errors import ConfigError, FeatcacheError
from featcache.files import (
    disk_error,
    follow_link,
    local_path,
    sync_folder,
    write_temporary,
)
from featcache.renames import exchange, find_windows_fault, rename_new
from featcache.untrusted import is_within

NEW, OLD = "new", "old"  # in ``NAME.partial``: a folder in the making, and one that was replaced
_MAX_HEADER_BYTES = 1 << 24


@dataclass(frozen=True)
class Kind:
    """What a verb writes, and how to recognise what it wrote before.

    Attributes:
        name: For messages, as ``cache``.
        expected: What should be at the place, for messages.
        error: Which error a refusal is.
        is_own: Whether the content of an existing path is of this kind. It must not follow links
            or open pipes. None: nothing is ever replaced.
        switch: The option that allows to replace one, empty where none is needed.
        is_folder: Whether it is a folder; an empty one that is there may be filled.
        may_stream: Whether pipes and character devices are written into.
        needs_folder: Whether the folder that it is to lie in must be there.
        may_be_link: Whether a link is followed; else it is refused.
        list_others: Names in an existing folder of this kind that are not the verb's own.
    """

    name: str
    expected: str
    error: type[FeatcacheError] = ConfigError
    is_own: Callable[[Path], bool] | None = None
    switch: str = ""
    is_folder: bool = False
    may_stream: bool = False
    needs_folder: bool = False
    may_be_link: bool = True
    list_others: Callable[[Path], list[str]] = field(default=lambda _: [])


class Output:
    """A file or folder that a verb will write.

    Args:
        path: As the user named it.
        what: The argument or option, for messages.
        kind: What will be written.
        replace: Whether the kind's switch was given.
        inputs: Files and folders that the same command reads.

    Attributes:
        path: As the user named it.
        target: What it stands for, links followed.
        kind: What will be written.

    Raises:
        FeatcacheError: If it is a URL, or links lead in a circle.
    """

    def __init__(
        self, path: str | Path, what: str, kind: Kind, *, replace: bool = True,
        inputs: Iterable[str | Path | None] = (),
    ) -> None:  # fmt: skip
        self.path, self.kind, self._what = local_path(path, what), kind, what
        self._inputs = [Path(p) for p in inputs if p is not None]
        self.target = self.path.absolute()
        if kind.may_be_link and not self.is_stream:  # /dev/stdout is a link to no file
            self.target = follow_link(self.target, what)
        self._has_switch = replace or not kind.switch
        self._at_start = None if self._is_empty_folder() else _identify(self.target)

    @property
    def is_stream(self) -> bool:
        """Whether it is a pipe, a character device or this process's standard output."""
        status = try_stat(self.target)
        return self.kind.may_stream and status is not None and _is_stream(status)

    def check(self) -> None:
        """Refuse a place that must not be written to; call it before any work is done.

        Raises:
            FeatcacheError: The kind's error, in one line.
        """
        if sys.platform == "win32" and not self.is_stream:
            for name in (self.path.name, self.target.name):
                if fault := find_windows_fault(name):
                    raise self._refusal(fault, "Choose another name")
        status = self._stat()
        self._refuse_inputs(status)
        if status is None:
            self._check_folder()
        elif not (self.kind.may_stream and _is_stream(status)) and not self._is_empty_folder():
            self._refuse_what_is_there(status)
            self._check_folder()

    def publish(self, temporary: Path) -> Path | None:
        """Give a finished temporary file or folder the output's name.

        Returns:
            Where a folder that was replaced lies now; None where there was none. A file that was
            replaced is gone.

        Raises:
            FeatcacheError: If something is there that must not be replaced.
        """
        if self._is_empty_folder():
            with contextlib.suppress(OSError):  # it is no longer empty
                self.target.rmdir()
        try:
            rename_new(temporary, self.target)
            return None
        except FileExistsError as error:
            if not self._may_replace(self.target):
                raise self._came_meanwhile() from error
        if exchange(temporary, self.target):
            if not self._may_replace(temporary):  # exchanged within microseconds
                exchange(temporary, self.target)
                raise self._came_meanwhile()
            if self.kind.is_folder:
                return temporary
            temporary.unlink()
            return None
        if not self.kind.is_folder:
            temporary.replace(self.target)
            return None
        old = temporary.with_name(OLD)
        rename_new(self.target, old)
        try:
            if not self._may_replace(old):
                raise self._came_meanwhile()
            rename_new(temporary, self.target)
        except BaseException:  # Ctrl-C between the two renames must not lose the old folder
            rename_new(old, self.target)
            raise
        return old

    def recover(self, partial: Path) -> None:
        """Clear away what a killed writer of this folder left; call it while holding its lock."""
        old, new, is_own = partial / OLD, partial / NEW, self.kind.is_own
        if old.is_dir() and not os.path.lexists(self.target):  # killed between two renames
            rename_new(old, self.target)
            self._at_start = _identify(self.target)
        if old.is_dir() and is_own is not None and is_own(self.target):
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)

    def _may_replace(self, path: Path) -> bool:
        """Return whether it is what was there at the start, and may be replaced."""
        kind = self.kind
        return (
            self._at_start is not None and self._at_start == _identify(path) and self._has_switch
            and kind.is_own is not None and kind.is_own(path) and not kind.list_others(path)
        )  # fmt: skip

    def _is_empty_folder(self) -> bool:
        target = self.target
        if not self.kind.is_folder or target.is_symlink() or not target.is_dir():
            return False
        return not any(target.iterdir())

    def _stat(self) -> os.stat_result | None:
        try:
            if self.target.is_symlink() and not self.kind.may_be_link:
                raise self._refusal("a link", "Remove it")
            return try_stat(self.target, strict=True)
        except OSError as error:
            raise self._refusal(str(error.strerror), "Choose another name") from error

    def _refuse_inputs(self, status: os.stat_result | None) -> None:
        for path in self._inputs:
            found = try_stat(path)
            is_inside = self.kind.is_folder and is_within(path, self.target)
            if (status and found and os.path.samestat(status, found)) or (found and is_inside):
                raise self.kind.error(
                    self._what, expected="another file than those that are read", found=path,
                    where=self.path, hint="Choose another name",
                )  # fmt: skip

    def _refuse_what_is_there(self, status: os.stat_result) -> None:
        kind = self.kind
        if kind.is_own is None:
            raise self._refusal("something already there", "Choose another name")
        is_right = stat.S_ISDIR(status.st_mode) if kind.is_folder else stat.S_ISREG(status.st_mode)
        if not is_right or not kind.is_own(self.target):
            found = f"something that is no {kind.name}"
            raise self._refusal(found, f"Choose another name: only a {kind.name} is replaced")
        if not self._has_switch:
            hint = f"Choose another name, or replace it with {kind.switch}"
            raise self._refusal(f"a {kind.name} that is there already", hint)
        if others := kind.list_others(self.target):
            listed = ", ".join(others[:5]) + (" and others" if len(others) > 5 else "")
            raise kind.error(
                self._what, expected=f"a {kind.name} and nothing else in it", where=self.path,
                found=f"other files: {listed}", hint="Move them away, or choose another name",
            )  # fmt: skip

    def _check_folder(self) -> None:
        folder = self.target.parent
        if self.kind.needs_folder and not folder.is_dir():
            raise self._refusal("no such folder", "Make the folder, or choose another")
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise self._refusal(f"{folder}, which is no folder", "Choose another name")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise self._refusal("a folder that cannot be written", "Check its permissions")

    def _came_meanwhile(self) -> FeatcacheError:
        return self._refusal(
            "something that came there in the meantime", "Move it away and run the command again"
        )

    def _refusal(self, found: object, hint: str) -> FeatcacheError:
        return self.kind.error(
            self._what, expected=self.kind.expected, found=found, where=self.path, hint=hint
        )


def try_stat(path: Path, *, strict: bool = False) -> os.stat_result | None:
    """Return the status of what is at a path, None where nothing is (or it cannot be told).

    With ``strict`` an error other than a missing file is raised.
    """
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except OSError:
        if strict:
            raise
        return None


def _identify(path: Path) -> tuple[int, ...] | None:
    """Return what tells a file from another of that name, None where there is none."""
    found = try_stat(path)
    if found is None:
        return None
    is_folder = stat.S_ISDIR(found.st_mode)
    content = () if is_folder else (found.st_size, found.st_mtime_ns)
    return (found.st_dev, found.st_ino, *content)


def _is_stream(status: os.stat_result) -> bool:
    """Whether one writes into it: a pipe, a character device, a socket or our standard output."""
    if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
        return True
    return _own_handle(status) is not None


def _own_handle(status: os.stat_result) -> int | None:
    """Return our own standard output or error if it is this file: ``--csv /dev/stdout > FILE``."""
    for handle in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), status):
                return handle
    return None


def csv_kind(
    name: str, *starts: Sequence[str], ends: Sequence[str] = (), may_have: Sequence[str] = ()
) -> Kind:
    """Return the kind of a CSV with a column per class.

    Args:
        name: For messages.
        *starts: Headers of the first columns, in each form that the verb writes.
        ends: Those of the last.
        may_have: Others, which some versions write and others do not.
    """

    def is_own(path: Path) -> bool:
        try:
            if path.stat().st_size == 0:  # nothing can be lost
                return True
            with path.open("rb") as file:
                line = file.readline(_MAX_HEADER_BYTES).decode()
            header = next(csv.reader([line]), [])
        except (OSError, ValueError, csv.Error):
            return False
        header = [column for column in header if column not in may_have]
        last = len(header) - len(ends)
        middles = [header[len(s) : last] for s in starts if header[: len(s)] == [*s]]
        is_whole = line.endswith("\n") and header[last:] == [*ends]
        kinds = ("prob_", "calibrated_")
        return is_whole and any(m and all(h.startswith(kinds) for h in m) for m in middles)

    return Kind(
        name, "a new file in an existing folder, or one of the same columns", is_own=is_own,
        may_stream=True, needs_folder=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- files


def write_output(output: Output, data: bytes) -> None:
    """Write one file: see ``write_outputs``."""
    write_outputs({output: data})


def write_outputs(contents: Mapping[Output, bytes]) -> None:
    """Write several files: all of them or, on a full disk or where one is refused, no new one.

    Raises:
        CacheError: If the disk is full or a folder cannot be written.
        FeatcacheError: If an output must not be replaced.
    """
    for output in contents:
        output.check()
    files = [output for output in contents if not output.is_stream]
    place = next(iter(contents)).path
    temporaries: dict[Output, Path] = {}
    made: list[Path] = []
    try:
        for output in files:
            place = output.path
            temporaries[output] = write_temporary(output.target, contents[output])
        for output in files:
            place, is_new = output.path, not os.path.lexists(output.target)
            output.publish(temporaries[output])
            made += [output.target] * is_new
        for output in contents.keys() - files:
            place = output.path
            _write_into(output.target, contents[output])
    except BaseException as error:
        for path in made:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise disk_error(error, place, sum(map(len, contents.values()))) from error
        raise
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    for folder in {output.target.parent for output in files}:
        sync_folder(folder)


def _write_into(path: Path, data: bytes) -> None:
    """Write into a pipe, a device or our own standard output."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    handle = _own_handle(path.stat())
    file: BinaryIO
    if handle is None:
        flags = os.O_WRONLY | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_CLOEXEC", 0)
        file = open(os.open(path, flags), "wb")  # noqa: PTH123, SIM115 (of a handle)
    else:
        file = open(os.dup(handle), "wb")  # noqa: PTH123, SIM115 (of a handle)
    with file:
        if not _is_stream(os.fstat(file.fileno())):
            raise OSError(errno.EEXIST, "it was a pipe or device, and is another file now")
        file.write(data)
