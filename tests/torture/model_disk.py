"""A model disk: what a process did to the files of one folder, and what a crash leaves of them.

A simplified ALICE (OSDI'14). The code under test runs for real, on a real folder, while every call
that touches that folder is counted, logged, and made to fail where a test wants it. From the log
follow the states of the disk at any call: after a kill all that was done so far is there; after a
power cut only the bytes of files that were fsynced are sure to be there, and the names in folders
that were fsynced; of the rest any part may be there, in any combination, torn or as zeros.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import io
import os
import random
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from featcache import renames

Files = dict[str, bytes | None]
"""What lies in a folder: ``/``-separated name -> bytes, None for a folder."""

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT}
FAULTS = (*ERRORS, "full", "short", "Ctrl-C before", "Ctrl-C after")
"""``full``: half of a write and then no space for the rest of the run, as a disk fills up."""

_real = SimpleNamespace(
    open=io.open, FileIO=io.FileIO, os_open=os.open, close=os.close, replace=os.replace,
    unlink=os.unlink, mkdir=os.mkdir, rmdir=os.rmdir, stat=os.stat, scandir=os.scandir,
    listdir=os.listdir, posix_fallocate=os.posix_fallocate, flock=fcntl.flock,
    rename_by=renames._rename_by,
)  # fmt: skip
_GROWING = {"create", "write", "allocate", "mkdir"}
_CHANGING = {*_GROWING, "truncate", "sync", "rename", "unlink", "rmdir"}


def suits(fault: str, call: str) -> bool:
    """Whether a call of this kind can fail like that."""
    if fault in {"short", "full"}:
        return call == "write"
    if fault == "Ctrl-C after":  # after one that changes nothing is before the next
        return call in _CHANGING
    return fault not in {"ENOSPC", "EDQUOT"} or call in _CHANGING - {"unlink", "rmdir"}


@dataclass(frozen=True)
class Change:
    """One thing done to the disk: ``of`` is the inode, of a file or of the folder of the names."""

    call: int
    kind: str  # write, size, sync, names
    of: int = -1
    offset: int = 0
    data: bytes = b""
    names: tuple[tuple[int, str, int | None], ...] = ()


@dataclass
class Disk:
    """The calls of one process on ``root``; use as a context manager around what it does.

    Args:
        root: The folder; nothing else is watched.
        fail_at: The number of the call that fails, or None.
        fault: How: one of ``FAULTS``.
        pid: What the process believes to be its number: names of temporary files have it.
    """

    root: Path
    fail_at: int | None = None
    fault: str = ""
    pid: int = 1000
    calls: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    marks: list[tuple[int, Any]] = field(default_factory=list)
    has_failed: bool = False

    def __post_init__(self) -> None:
        self._is_full, self._num_drawn = False, 0
        self._handles: dict[int, int] = {}  # of open files and folders -> inode
        # What is there at the start is there for good: inode -> bytes, or name -> inode.
        self._first: dict[int, bytes | dict[str, int]] = {0: {}}
        for name, data in sorted(read_files(self.root).items()):
            folder, _, last = name.rpartition("/")
            number = len(self._first)
            self._first[number] = {} if data is None else data
            self._names(self._first, folder)[last] = number
        # Names as they are now; the bytes are on the real disk.
        self._now: dict[int, Any] = {
            number: dict(thing) if isinstance(thing, dict) else None
            for number, thing in self._first.items()
        }

    # ------------------------------------------------------------------------- watching and failing

    def __enter__(self) -> Disk:
        self._patches = contextlib.ExitStack()
        replaced: list[tuple[Any, str, Callable[..., Any]]] = [
            (io, "open", self._open), (builtins, "open", self._open), (io, "FileIO", self._raw),
            (os, "open", self._os_open), (os, "close", self._os_close), (os, "fsync", self._fsync),
            (os, "replace", self._rename), (os, "rename", self._rename),
            (os, "unlink", self._unlink), (os, "remove", self._unlink),
            (os, "mkdir", self._mkdir), (os, "rmdir", self._rmdir),
            (os, "stat", self._reading(_real.stat, "stat")),
            (os, "scandir", self._reading(_real.scandir, "list")),
            (os, "listdir", self._reading(_real.listdir, "list")),
            (os, "posix_fallocate", self._allocate), (fcntl, "flock", self._lock),
            (os, "getpid", lambda: self.pid), (renames, "_rename_by", self._rename_by),
            (secrets, "token_hex", self._draw),
        ]  # fmt: skip
        for owner, name, function in replaced:
            self._patches.enter_context(mock.patch.object(owner, name, function))
        # By paths: the same calls, easier to follow than those relative to handles.
        self._patches.enter_context(mock.patch.object(shutil, "_use_fd_functions", False))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def mark(self, value: Any) -> None:
        """Note that something was promised after the calls so far."""
        self.marks.append((len(self.calls), value))

    @contextlib.contextmanager
    def _call(self, kind: str) -> Iterator[bool]:
        """Count a call; fail if it is its turn. Yields whether to write half only."""
        number = len(self.calls)
        self.calls.append(kind)
        if self._is_full and kind in _GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if number != self.fail_at or not suits(self.fault, kind):
            yield False
            return
        self.has_failed = self.fault != "Ctrl-C after"
        if self.fault in ERRORS:
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]))
        if self.fault == "Ctrl-C before":
            raise KeyboardInterrupt
        self._is_full = self.fault == "full"
        yield self.fault in {"short", "full"}
        if self.fault == "Ctrl-C after":  # not after one that failed by itself
            self.has_failed = True
            raise KeyboardInterrupt

    def _note(self, kind: str, **facts: Any) -> None:
        self.changes.append(Change(len(self.calls) - 1, kind, **facts))

    def _relative(self, path: Any) -> str | None:
        """Return the name of what is in ``root``, "" for itself, None for what is elsewhere."""
        if isinstance(path, int):
            return None
        text, root = os.path.abspath(os.fsdecode(path)), str(self.root)  # noqa: PTH100
        if text == root:
            return ""
        return text[len(root) + 1 :] if text.startswith(root + "/") else None

    @staticmethod
    def _names(things: dict[int, Any], folder: str) -> dict[str, int]:
        names: dict[str, int] = things[0]
        for part in filter(None, folder.split("/")):
            names = things[names[part]]
        return names

    def _inode(self, name: str) -> int:
        folder, _, last = name.rpartition("/")
        return self._names(self._now, folder)[last] if name else 0

    def _rewire(self, *changes: tuple[str, int | None]) -> None:
        """Give names to inodes, or take them away, all at once."""
        names = []
        for name, inode in changes:
            folder, _, last = name.rpartition("/")
            names.append((self._inode(folder), last, inode))
            if inode is None:
                del self._names(self._now, folder)[last]
            else:
                self._names(self._now, folder)[last] = inode
        self._note("names", names=tuple(names))

    def _add(self, name: str, thing: dict[str, int] | None) -> int:
        inode = len(self._now)
        self._now[inode] = thing
        self._rewire((name, inode))
        return inode

    # ----------------------------------------------------------------------------- the calls

    def _raw(self, path: Any, mode: str = "r") -> io.RawIOBase:
        is_elsewhere = self._relative(path) is None
        return _real.FileIO(path, mode) if is_elsewhere else _File(self, path, mode)

    def _open(
        self, path: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any
    ) -> Any:
        if self._relative(path) is None and path not in self._handles:
            return _real.open(path, mode, buffering, *arguments, **options)
        raw = _File(self, path, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedReader
        buffered: Any = (kind if "+" in mode or "r" in mode else io.BufferedWriter)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *arguments, **options)

    def _os_open(self, path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        name = self._relative(path)
        if name is None:
            return int(_real.os_open(path, flags, *arguments, **options))
        is_new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
        handle = -1
        try:
            with self._call("create" if is_new else "open"):
                handle = int(_real.os_open(path, flags, *arguments, **options))
                self._handles[handle] = self._add(name, None) if is_new else self._inode(name)
        except KeyboardInterrupt:  # nobody has the handle
            if handle >= 0:
                self._os_close(handle)
            raise
        return handle

    def _os_close(self, handle: int) -> None:
        self._handles.pop(handle, None)
        _real.close(handle)

    def _fsync(self, handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        if number not in self._handles:
            return
        with self._call("sync"):  # the real disk need not do it
            self._note("sync", of=self._handles[number])

    def _rename(self, source: Any, target: Any) -> None:
        one, other = self._relative(source), self._relative(target)
        assert one is not None
        assert other is not None
        with self._call("rename"):
            _real.replace(source, target)
            self._rewire((one, None), (other, self._inode(one)))

    def _rename_by(self, flag: int, source: Any, target: Any) -> None:
        """Stand for renameat2: replace nothing, or exchange two names at once."""
        one, other = self._relative(source), self._relative(target)
        assert one is not None
        assert other is not None
        is_exchange = flag == renames._RENAME_EXCHANGE
        with self._call("rename"):
            _real.rename_by(flag, source, target)
            self._rewire(
                (one, self._inode(other) if is_exchange else None), (other, self._inode(one))
            )

    def _draw(self, _: int) -> str:
        self._num_drawn += 1
        return f"{self.pid:08x}{self._num_drawn:08x}"

    def _changing(self, function: Callable[..., None], kind: str, path: Any, **options: Any) -> str:
        name = self._relative(path)
        if name is None:
            function(path, **options)
            return ""
        assert not options or options.keys() == {"mode"}, "relative to a handle: not watched"
        with self._call(kind):
            function(path, **options)
            if kind == "mkdir":
                self._add(name, {})
            else:
                self._rewire((name, None))
        return name

    def _unlink(self, path: Any, **options: Any) -> None:
        self._changing(_real.unlink, "unlink", path, **options)

    def _mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        self._changing(_real.mkdir, "mkdir", path, mode=mode, **options)

    def _rmdir(self, path: Any, **options: Any) -> None:
        self._changing(_real.rmdir, "rmdir", path, **options)

    def _reading(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            if self._relative(path) is None:
                return function(path, *arguments, **options)
            with self._call(kind):
                return function(path, *arguments, **options)

        return call

    def _allocate(self, handle: int, offset: int, size: int) -> None:
        with self._call("allocate"):
            _real.posix_fallocate(handle, offset, size)
            if handle in self._handles:
                self._note("size", of=self._handles[handle], offset=os.fstat(handle).st_size)

    def _lock(self, file: Any, operation: int) -> None:
        with self._call("lock"):
            _real.flock(file, operation)

    # ------------------------------------------------------------------------- crashes

    def after_kill(self, call: int, *, half: bool = False) -> Files:
        """Return what is there when the process is killed before that call (``half``: in it)."""
        things = {i: _copy(thing) for i, thing in self._first.items()}
        for change in self.changes:
            if change.call >= call + half:
                break
            torn = half and change.call == call and change.kind == "write"
            _apply(things, change, change.data[: len(change.data) // 2] if torn else change.data)
        return self._collect(things)

    def after_power_cut(self, call: int, rng: random.Random) -> Files:
        """Return what may be there when the power is cut before that call.

        Of what was not synced nothing, everything, the older part or any part is there; the last
        write to a file may be torn or be zeros.
        """
        things = {i: _copy(thing) for i, thing in self._first.items()}
        loose: list[Change] = []
        for change in self.changes:
            if change.call >= call:
                break
            if change.kind != "sync":
                loose.append(change)
                continue
            # A folder's sync keeps a rename out of it too, which is one change on the disk.
            safe = [c for c in loose if change.of in {c.of, *(folder for folder, _, _ in c.names)}]
            loose = [c for c in loose if c not in safe]
            for kept in safe:
                _apply(things, kept, kept.data)
        names = [c for c in loose if c.names]
        data = [c for c in loose if not c.names]
        for change in _some(names, rng):
            _apply(things, change, b"")
        for inode in sorted({c.of for c in data}):
            written = _some([c for c in data if c.of == inode], rng)
            for change in written:
                torn = change is written[-1] and change.kind == "write" and rng.random() < 0.5
                part = change.data[: rng.randint(0, len(change.data))] if torn else change.data
                _apply(things, change, bytes(len(part)) if rng.random() < 0.25 else part)
        return self._collect(things)

    def _collect(self, things: dict[int, Any]) -> Files:
        """Return what can be reached by name from the root."""
        files: Files = {}
        waiting = [("", things[0])]
        while waiting:
            prefix, names = waiting.pop()
            for name, inode in names.items():
                is_folder = isinstance(self._now[inode], dict)
                files[prefix + name] = None if is_folder else bytes(things.get(inode, b""))
                if is_folder:
                    waiting.append((f"{prefix}{name}/", things.get(inode, {})))
        return files

    def complete(self) -> Files:
        """Return what is there by the log: what is on the real disk, if nothing was missed."""
        return self.after_kill(len(self.calls))


class _File(io.FileIO):
    """A file whose reads and writes are calls of the disk."""

    def __init__(self, disk: Disk, path: Any, mode: str) -> None:
        self._disk, self._appends = disk, "a" in mode
        if path in disk._handles:  # opened by os.open
            super().__init__(path, mode)
            self._inode = disk._handles[path]
            return
        name = disk._relative(path)
        assert name is not None
        is_new = not os.path.lexists(path)
        try:
            with disk._call("create" if is_new and "r" not in mode else "open"):
                super().__init__(path, mode)
                inode = disk._add(name, None) if is_new else disk._inode(name)
                disk._handles[self.fileno()] = self._inode = inode
                if "w" in mode and not is_new:
                    disk._note("size", of=inode)
        except KeyboardInterrupt:  # nobody has the file
            with contextlib.suppress(ValueError):  # not open yet
                self.close()
            raise

    def write(self, data: Any, /) -> int:
        part = bytes(data)
        with self._disk._call("write") as half:
            part = part[: max(1, len(part) // 2)] if half else part
            offset = os.fstat(self.fileno()).st_size if self._appends else self.tell()
            count = super().write(part)
            self._disk._note("write", of=self._inode, offset=offset, data=part[:count])
        return count

    def readinto(self, buffer: Any, /) -> int:
        with self._disk._call("read"):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with self._disk._call("read"):
            return super().readall()

    def truncate(self, size: int | None = None, /) -> int:
        with self._disk._call("truncate"):
            length = super().truncate(size)
            self._disk._note("size", of=self._inode, offset=length)
        return length

    def close(self) -> None:
        if not self.closed:
            self._disk._handles.pop(self.fileno(), None)
        super().close()


def _copy(thing: bytes | dict[str, int]) -> Any:
    return dict(thing) if isinstance(thing, dict) else bytearray(thing)


def _apply(things: dict[int, Any], change: Change, data: bytes) -> None:
    for folder, name, inode in change.names:
        names = things.setdefault(folder, {})
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode
    if change.kind == "write":
        content = things.setdefault(change.of, bytearray())
        content.extend(bytes(max(0, change.offset - len(content))))
        content[change.offset : change.offset + len(data)] = data
    if change.kind == "size":
        content = things.setdefault(change.of, bytearray())
        del content[change.offset :]
        content.extend(bytes(change.offset - len(content)))


def _some(changes: list[Change], rng: random.Random) -> list[Change]:
    """Return what the disk kept of changes that it did not have to keep, in their order."""
    kept = rng.choice(["none", "all", "older", "any"])
    if kept == "older":
        return changes[: rng.randint(0, len(changes))]
    return [c for c in changes if kept == "all" or (kept == "any" and rng.random() < 0.5)]


def read_files(root: Path) -> Files:
    """Return what lies in a real folder."""
    return {
        path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in root.rglob("*")
    }


def write_files(root: Path, files: Files) -> Path:
    """Make a real folder of it."""
    root.mkdir()
    for name, data in sorted(files.items()):
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
    return root
