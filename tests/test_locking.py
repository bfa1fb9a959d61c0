"""One writer at a time: who holds the lock, and that a kill frees it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from failing import failing
from windows import act_as_windows

from featcache import locking
from featcache.errors import CacheError, FeatcacheError
from featcache.locking import folder_lock, refuse_held, remove_lock, writer_lock

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and flock of POSIX")


class Boom(BaseException):
    """Neither an Exception nor anything a library would catch, like Ctrl-C."""


@needs_posix
@pytest.mark.parametrize("left", [b"", b"proc", bytes(60), bytes(3) + b"cess 12" + bytes(50)])
def test_a_lock_that_a_power_cut_tore_can_be_taken(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "lock").write_bytes(left)
    with writer_lock(tmp_path / "lock", "cache"):
        assert (tmp_path / "lock").read_bytes().startswith(f"process {os.getpid()} ".encode())


HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from featcache.locking import writer_lock
with writer_lock(Path(sys.argv[1]), "cache"):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


@needs_posix
def test_a_second_writer_is_told_who_the_first_is_and_a_kill_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "c.h5.partial" / "lock"
    for _ in range(4):
        child = hold(path)
        try:
            with (
                pytest.raises(FeatcacheError, match=rf"process {child.pid} on .* since 20"),
                writer_lock(path, "cache"),
            ):
                pytest.fail("two writers")
        finally:
            child.kill()
            child.communicate()
        with writer_lock(path, "cache"):  # at once: no waiting, no file to delete by hand
            assert f"process {os.getpid()} on " in path.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_a_lock_that_is_free_a_moment_later_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    path = tmp_path / "lock"
    with path.open("wb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)

        def read_sign(_: object) -> str:
            holder.close()  # as the system does when a killed process has ended at last
            return "a process that was killed"

        monkeypatch.setattr(locking, "_read_sign", read_sign)
        with writer_lock(path, "cache"):
            assert path.read_bytes().startswith(b"process ")


@needs_posix
def test_a_lock_file_removed_before_it_was_locked_is_not_taken_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer before us has opened its lock, ends, and removes the folder between two lines."""
    import fcntl

    path, flock, raced = tmp_path / "c.h5.partial" / "lock", fcntl.flock, []

    def racing(file: Any, operation: int) -> None:
        if not raced:
            raced.append(path)
            shutil.rmtree(path.parent)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", racing)
    with writer_lock(path, "cache"), path.open("rb") as other, pytest.raises(BlockingIOError):
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert raced


def test_the_lock_is_free_after_its_block_also_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(Boom), writer_lock(path, "cache"):
        raise Boom
    with (
        writer_lock(path, "cache"),
        pytest.raises(FeatcacheError, match=f"process {os.getpid()}"),
        writer_lock(path, "cache"),
    ):
        pytest.fail("two writers in one process")
    take = "import sys; from pathlib import Path; from featcache.locking import writer_lock\n"
    take += "with writer_lock(Path(sys.argv[1]), 'cache'): pass"
    subprocess.run([sys.executable, "-c", take, str(path)], check=True)


@needs_posix
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", failing(OSError(code, os.strerror(code))))
    said = r"that can lock files, found .* \(.*lock\)\. Write to a local disk and copy"
    with pytest.raises(CacheError, match=said), writer_lock(tmp_path / "lock", "cache"):
        pytest.fail("not locked")


@needs_posix
def test_a_lock_is_asked_for_as_nfs_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    flock = fcntl.flock

    def strict(file: Any, operation: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")  # flock(2) on NFS
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", strict)
    with writer_lock(tmp_path / "lock", "run"), pytest.raises(CacheError, match="one at work"):
        refuse_held(tmp_path, "run")
    refuse_held(tmp_path, "run")
    (tmp_path / "lock").chmod(0o444)
    refuse_held(tmp_path, "run")


@needs_posix
def test_by_the_rules_of_windows_there_is_one_writer_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c.h5.partial"
    with act_as_windows(monkeypatch):
        for _ in range(2):
            with folder_lock(folder, "cache", "x"):
                remove_lock(folder)  # as every writer does at its end
                assert [path.name for path in folder.iterdir()] == ["lock"]  # open: it stays
                with pytest.raises(CacheError, match=f"process {os.getpid()} on .* since 20"):
                    refuse_held(folder, "cache")
                with (
                    pytest.raises(CacheError, match="one at work"),
                    folder_lock(folder, "cache", "x"),
                ):
                    pytest.fail("two writers")
            assert list(tmp_path.iterdir()) == []
        with folder_lock(folder, "cache", "x"):
            (folder / "shard").touch()
        assert sorted(path.name for path in folder.iterdir()) == ["lock", "shard"]
        refuse_held(folder, "cache")  # and leaves it free
        with folder_lock(folder, "cache", "x"):
            (folder / "shard").unlink()
        assert list(tmp_path.iterdir()) == []
