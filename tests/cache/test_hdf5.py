from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sample_containers import (
    FINGERPRINT,
    same,
    some_arrays,
    write,
)

from featcache.cache import hdf5
from featcache.cache.container import open_container
from featcache.cache.hdf5 import ArraySource, write_container
from featcache.errors import CacheError
from featcache.files import disk_error, sha256_file

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

# --- h5py sees the same arrays


def test_plain_h5py_reads_the_same_arrays(tmp_path: Path) -> None:
    arrays = some_arrays()
    write(tmp_path / "c.h5", arrays)
    with h5py.File(tmp_path / "c.h5") as file:
        seen: list[str] = []
        file.visititems(lambda name, item: seen.append(name) if hasattr(item, "shape") else None)
        assert sorted(seen) == sorted(arrays)
        for name, array in arrays.items():
            assert same(np.asarray(file[name][()], array.dtype), array)
        assert file.attrs["format"] == b"featcache"
        assert file.attrs["format_version"] == 1
        assert file.attrs["fingerprint"].decode() == FINGERPRINT


def test_the_file_holds_nothing_a_reader_would_have_to_follow(tmp_path: Path) -> None:
    container = write(tmp_path / "c.h5", some_arrays())
    with h5py.File(tmp_path / "c.h5") as file:
        assert file.userblock_size == container.user_block_bytes
        for name, entry in container.arrays.items():
            data = file[name]
            assert data.chunks is data.compression is data.external is None
            assert not any((data.is_virtual, data.fletcher32, data.shuffle, data.scaleoffset))
            assert h5py.check_string_dtype(data.dtype) is None or data.dtype.itemsize > 0
            assert data.dtype.kind in "fiuS"
            assert file.get(name, getlink=True).__class__ is h5py.HardLink
            if entry.num_bytes:
                assert data.id.get_offset() == entry.offset


def test_the_file_can_be_grown_and_edited_with_h5py_like_any_other(tmp_path: Path) -> None:
    write(tmp_path / "c.h5", some_arrays())
    with h5py.File(tmp_path / "c.h5", "r+") as file:
        file["mine"] = np.arange(5)
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["mine"][()].tolist() == [0, 1, 2, 3, 4]
        assert same(file["splits/train/targets"][()], some_arrays()["splits/train/targets"])
    with pytest.raises(CacheError):  # and it no longer passes for what featcache wrote
        open_container(tmp_path / "c.h5")


# --- streaming


def test_blocks_make_the_same_file_as_the_whole_array(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(1000, 33)).astype("<f4")
    cuts = [0, 1, 1, 500, 997, 1000]
    pieces = [array[i:j] for i, j in pairwise(cuts)]
    for name, blocks in {
        "one": [array],
        "many": pieces,
        "fortran": [np.asfortranarray(array)],
    }.items():
        source = ArraySource("features", array.shape, array.dtype, lambda b=blocks: iter(b))
        write_container(tmp_path / name, [source], FINGERPRINT, ["features"])
    one = (tmp_path / "one").read_bytes()
    assert one == (tmp_path / "many").read_bytes() == (tmp_path / "fortran").read_bytes()
    assert same(open_container(tmp_path / "many").read("features"), array)


@pytest.mark.parametrize("rows", [[3, 3], [3, 3, 3], []])
def test_blocks_that_do_not_add_up_leave_no_file(tmp_path: Path, rows: list[int]) -> None:
    blocks = [np.zeros((n, 4), "<f4") for n in rows]
    source = ArraySource("a", (8, 4), np.dtype("<f4"), lambda: blocks)
    other = ArraySource.of("b", np.zeros(3, "<i8"))
    with pytest.raises(ValueError, match="blocks do not add up"):
        write_container(tmp_path / "c", [source, other], FINGERPRINT, [])
    assert list(tmp_path.iterdir()) == []


def test_libhdf5_is_never_handed_the_arrays() -> None:
    """The skeleton of 512 MB of features stays a few KB: nothing is filled or written by HDF5."""
    shape = (100_000, 1280)
    sources = [
        ArraySource("splits/train/features", shape, np.dtype("<f4"), list),
        ArraySource("splits/train/targets", shape[:1], np.dtype("<i8"), list),
    ]
    skeleton, entries = hdf5._make_skeleton(sources, FINGERPRINT, 4096)
    assert skeleton.length > 512_000_000
    assert sum(map(len, skeleton.pieces.values())) < 8192
    assert [e.shape for e in entries] == [shape, shape[:1]]


def test_one_content_gives_one_file(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, some_arrays())
        time.sleep(1.1 if name == "a" else 0)  # HDF5's times have a resolution of one second
    assert sha256_file(tmp_path / "a") == sha256_file(tmp_path / "b")


# --- full disks and folders that cannot be written

FULL = """
import json, os, resource, sys
import numpy as np
from featcache import CacheError, write_cache
rows, targets = np.ones((4000, 128), np.float32), np.zeros(4000, int)
paths = list(map(str, range(4000)))
for line in sys.stdin:
    path, limit = json.loads(line)
    if (child := os.fork()) == 0:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write_cache(path, rows, targets, paths, classes=["a"], overwrite=True)
        except CacheError as error:
            print(error, flush=True)
            sys.exit(3)
        print("written", flush=True)
        sys.exit(0)  # through the interpreter's end, where libhdf5 used to crash it
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(code), flush=True)
"""

Writer = Callable[..., tuple[str, int]]


@pytest.fixture(scope="module")
def write_in_child() -> Iterator[Writer]:
    """Write a cache of 2 MB in a process of its own; return what it said and its exit code."""
    command = [sys.executable, "-c", FULL]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def answer(path: Path, limit: int = 0) -> tuple[str, int]:
            server.stdin.write(json.dumps([str(path), limit]) + "\n")
            server.stdin.flush()
            lines = [server.stdout.readline()]
            while not lines[-1].strip().lstrip("-").isdigit():
                lines.append(server.stdout.readline())
                assert lines[-1], "the writing process is gone"
            return "".join(lines[:-1]), int(lines[-1])

        yield answer


@needs_linux
@pytest.mark.parametrize("limit", [1, 5000, 1_000_000, 2_050_000])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    tmp_path: Path, limit: int, write_in_child: Writer
) -> None:
    """RLIMIT_FSIZE meets the writer at any byte; libhdf5 itself would crash the interpreter."""
    old = write(tmp_path / "old.h5", some_arrays()).path.read_bytes()
    for name in ("old.h5", "new.h5"):
        said, code = write_in_child(tmp_path / name, limit)
        assert code == 3
        assert said.startswith("file size: expected 2,")
        assert len(said.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["old.h5"]
    assert (tmp_path / "old.h5").read_bytes() == old


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no way to reserve space here")
def test_a_full_disk_shows_before_any_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def full(handle: int, offset: int, size: int) -> None:
        asked.append((offset, size))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    source = ArraySource("a", (9, 9), np.dtype("<f4"), lambda: pytest.fail("must not be read"))
    with pytest.raises(CacheError, match="disk space"):
        write_container(tmp_path / "c", [source], FINGERPRINT, [])
    assert list(tmp_path.iterdir()) == []
    ((offset, size),) = asked
    monkeypatch.undo()
    assert (offset, size) == (
        0,
        write(tmp_path / "c", {"a": np.zeros((9, 9), "<f4")}).path.stat().st_size,
    )


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_space_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def unable(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", unable, raising=False)
    assert same(write(tmp_path / "c", {"a": np.ones(3, "<f4")}).map("a"), np.ones(3, "<f4"))


@pytest.mark.parametrize("limit", [1, 5000, 100_000])
def test_a_full_disk_is_met_also_where_space_cannot_be_reserved(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every file system has fallocate: then a write, or the flush at the end, is what fails."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    written = 0
    raw_write = io.FileIO.write

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal written
            if written + len(data) > limit:
                raise OSError(errno.ENOSPC, "No space left on device")
            written += len(data)
            return raw_write(self, data)

    real_open = builtins.open

    def open_full(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb":
            return io.BufferedWriter(Full(file, "w"))
        return real_open(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_full)
    with pytest.raises(CacheError, match="disk space"):
        write(tmp_path / "c.h5", {"a": np.ones(50_000, "<f4")})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@needs_linux
def test_a_really_full_disk_leaves_nothing_and_after_making_room_it_works(
    small_disk: Path, write_in_child: Writer
) -> None:
    old = write(small_disk / "c.h5", some_arrays()).path.read_bytes()
    ballast = small_disk / "ballast"
    for free in (0, 5000, 700_000, 1_500_000):
        ballast.write_bytes(b"")
        space = os.statvfs(small_disk)
        ballast.write_bytes(b"x" * (space.f_bavail * space.f_bsize - free))
        said, code = write_in_child(small_disk / "c.h5")
        assert (code, said[:11]) == (3, "disk space:")
        assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "c.h5"]
        assert (small_disk / "c.h5").read_bytes() == old
    ballast.unlink()
    assert write_in_child(small_disk / "c.h5") == ("written\n", 0)
    assert open_container(small_disk / "c.h5").arrays["splits/all/features"].shape == (4000, 128)


def test_a_folder_that_is_not_there_or_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "no" / "c.h5", tmp_path / "file" / "c.h5", tmp_path / "folder"):
        with pytest.raises(CacheError, match=r"^writing: expected a writable folder"):
            write(path, some_arrays())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_errors_of_the_disk_are_told_from_others(tmp_path: Path) -> None:
    for code, what in (
        (errno.ENOSPC, "disk space"), (errno.EDQUOT, "disk space"), (errno.EFBIG, "file size"),
    ):  # fmt: skip
        message = str(disk_error(OSError(code, os.strerror(code)), tmp_path / "c", 1234567))
        assert message.startswith(f"{what}: expected 1,234,567 bytes, found ")
    message = str(disk_error(OSError(errno.ENOSPC, ""), tmp_path / "c", 0))
    wanted, free = (int(n.replace(",", "")) for n in re.findall("([0-9,]+) bytes", message))
    assert wanted > free
    for code in (errno.EACCES, errno.EROFS, errno.EIO):
        message = str(disk_error(OSError(code, os.strerror(code)), tmp_path / "c", 1))
        assert os.strerror(code) in message
