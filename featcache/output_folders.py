"""Folders as outputs: built aside under a lock, whole or absent, as files are."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from featcache.files import disk_error, make_folder, set_mode, sync_file, sync_folder
from featcache.locking import folder_lock, refuse_held, remove_lock_alone
from featcache.outputs import NEW, Output, try_stat
from featcache.renames import beside


def check_folder(output: Output) -> None:
    """Refuse a folder that ``new_folder`` would refuse, before any work is done.

    Raises:
        FeatcacheError: As ``new_folder``.
    """
    output.check()
    refuse_held(beside(output.target, ".partial"), output.target.name)


@contextlib.contextmanager
def new_folder(
    output: Output, *, state: Iterable[str] = (), sync: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Build a folder as ``NAME.partial/new``, and give it its name if nothing failed.

    ``NAME.partial/lock`` is held meanwhile: there is one writer at a time. Of what else lies in
    ``NAME.partial`` nothing is touched but our own.

    Args:
        output: The folder to make.
        state: Names of files in ``NAME.partial`` that are kept if something fails, so that the same
            command can resume, and removed at the end.
        sync: Makes what was built survive a power cut. None syncs every file and folder.

    Raises:
        FeatcacheError: If the output must not be replaced, another process is writing it, or
            ``NAME.partial`` is somebody else's.
    """
    output.check()
    try:
        make_folder(output.target.parent)
    except OSError as error:
        raise disk_error(error, output.target, 4096) from error  # a folder's block
    partial = beside(output.target, ".partial")
    with folder_lock(partial, output.target.name, ".*"):
        new, identity = partial / NEW, None
        try:
            output.recover(partial)
            output.check()  # again: another process may have made it before the lock was ours
            new.mkdir()
            identity = new.stat()
            yield new
            try:
                _finish(output, new, sync or _sync_tree)
            except OSError as error:
                raise disk_error(error, output.path, 4096) from error
            for name in state:
                (partial / name).unlink(missing_ok=True)
        finally:
            found = try_stat(new)
            if identity and found and os.path.samestat(identity, found):
                shutil.rmtree(new, ignore_errors=True)
            remove_lock_alone(partial)


def _finish(output: Output, new: Path, sync: Callable[[Path], None]) -> None:
    """Make a folder survive a power cut, give it its name, and remove the one that had it."""
    _keep_modes(output.target, new)
    sync(new)
    old = output.publish(new)
    sync_folder(output.target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb+") as file:
                sync_file(file.fileno(), path)
    sync_folder(folder)


def _keep_modes(old: Path, new: Path) -> None:
    """Give a new folder and its files the modes of those that they replace."""
    for path in [new, *new.rglob("*")]:
        before = try_stat(old / path.relative_to(new))
        if before is not None and stat.S_IFMT(before.st_mode) == stat.S_IFMT(path.stat().st_mode):
            set_mode(path, stat.S_IMODE(before.st_mode))
