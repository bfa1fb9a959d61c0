from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
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
    SAMPLES,
    edit_block,
    entry_of,
    read_block,
    same,
    some_arrays,
    write,
    write_block,
)

from featcache.cache import hdf5
from featcache.cache.container import Container, open_container
from featcache.cache.hdf5 import ArraySource, compare_with_hdf5, write_container
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
            write_cache(path, rows, targets, paths, classes=["a"])
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
        assert said.startswith("disk space: expected 2,")
        assert "bytes free" in said
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

    real_open = Path.open

    def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb":
            return io.BufferedWriter(Full(str(self), "w"))
        return real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
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
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message = str(disk_error(OSError(code, os.strerror(code)), tmp_path / "c", 1234567))
        assert message.startswith("disk space: expected 1,234,567 bytes, found ")
    for code in (errno.EACCES, errno.EROFS, errno.EIO):
        message = str(disk_error(OSError(code, os.strerror(code)), tmp_path / "c", 1))
        assert os.strerror(code) in message


# --- the table against libhdf5


def test_a_file_as_written_shows_no_differences(tmp_path: Path) -> None:
    assert compare_with_hdf5(write(tmp_path / "c", some_arrays())) == []


def test_a_table_that_lies_is_found(tmp_path: Path) -> None:
    """Two arrays of one shape change places: every check of the table alone passes."""
    arrays = {"a": np.arange(40, dtype="<i8"), "b": -np.arange(40, dtype="<i8"), "c": np.zeros(3)}
    arrays["c"] = arrays["c"].astype("<f4")

    def swap(block: dict[str, Any]) -> None:
        a, b = entry_of(block, "a"), entry_of(block, "b")
        a["offset"], b["offset"] = b["offset"], a["offset"]

    write(tmp_path / "c", arrays)
    container = open_container(edit_block(tmp_path / "c", swap))
    assert container.map("a").tolist() == arrays["b"].tolist()
    found = compare_with_hdf5(container)
    assert [line.split(":")[0] for line in found] == ["/a", "/b"]


def test_every_kind_of_lie_is_found(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "/a": lambda b: entry_of(b, "a").update(dtype="|S8"),
        "/a ": lambda b: entry_of(b, "a").update(shape=[20]),
        "/a  ": lambda b: entry_of(b, "a").update(shape=[4, 10]),
        "/none": lambda b: entry_of(b, "a").update(name="none"),
        "/a   ": lambda b: b["arrays"].pop(0),
        "attribute fingerprint": lambda b: b.update(fingerprint="f" * 64),
    }
    for wanted, change in changes.items():
        write(tmp_path / "c", {"a": np.arange(40, dtype="<i8"), "b": np.zeros(1, "<f4")})
        found = compare_with_hdf5(open_container(edit_block(tmp_path / "c", change)))
        assert any(line.startswith(wanted.strip()) for line in found), (wanted, found)


def wrap(path: Path, fill: Any) -> Container:
    """Return a container whose payload was made by h5py, with a table that looks honest."""
    block = read_block(write(path, {"a": np.zeros(8, "|u1")}).path)
    with h5py.File(path, "w", userblock_size=4096) as file:
        fill(file)
        file.attrs["format"] = np.bytes_("featcache")
        file.attrs["fingerprint"] = np.bytes_(FINGERPRINT)
    payload = path.read_bytes()[4096:]
    block["payload_sha256"] = hashlib.sha256(payload).hexdigest()
    block["payload_bytes"] = len(payload)
    entry_of(block, "a")["offset"] = 4096
    return open_container(write_block(path, block, payload))


def test_data_that_hdf5_would_fetch_from_elsewhere_is_a_difference(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"password")
    source = h5py.VirtualSource(str(tmp_path / "x.h5"), "a", (8,))

    def external(file: h5py.File) -> None:
        file.create_dataset("a", (8,), "u1", external=[(str(secret), 0, 8)])

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((8,), "u1")
        layout[:] = source
        file.create_virtual_dataset("a", layout)

    def chunked(file: h5py.File) -> None:
        file.create_dataset("a", data=np.arange(8, dtype="u1"), chunks=(4,))

    for fill in (external, virtual, chunked):
        container = wrap(tmp_path / "c.h5", fill)
        found = compare_with_hdf5(container)
        assert found
        assert found[0].startswith("/a:")
        assert "password" not in "".join(found)


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.h5")) or [None], ids=str)
def test_files_that_hang_or_crash_libhdf5_cost_a_child_process(
    sample: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sample is None:
        pytest.skip("the hostile samples of ../shared/research are not here")
    start = time.monotonic()
    container = write(tmp_path / "c", some_arrays())
    found = compare_with_hdf5(dataclasses.replace(container, path=sample))
    assert found
    assert time.monotonic() - start < 8


@needs_linux
@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("import time; time.sleep(60)", "no answer of libhdf5 within 1 s"),
        (
            "import resource as r; r.setrlimit(r.RLIMIT_CPU, (1, 2)); any(iter(int, 1))",
            "no answer within 8 s of computing",
        ),
        ("import os; os.kill(os.getpid(), 11)", "cannot read it (exit -11)"),
        ("import sys; sys.exit('no such thing')", "no such thing"),
    ],
)
def test_a_child_that_hangs_crashes_or_fails_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, wanted: str
) -> None:
    container = write(tmp_path / "c", some_arrays())
    child = tmp_path / "python"
    child.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}"\n')
    child.chmod(0o755)
    monkeypatch.setattr(hdf5.sys, "executable", str(child))
    monkeypatch.setattr(hdf5, "_CHECK_WAIT_SECONDS", 1 if "sleep" in code else 60)
    (found,) = compare_with_hdf5(container)
    assert wanted in found


@needs_linux
def test_a_file_that_hdf5_could_not_lock_is_compared_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on network file systems: here another process holds the lock that HDF5 would take."""
    import fcntl

    container = write(tmp_path / "c", some_arrays())
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    with (tmp_path / "c").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert compare_with_hdf5(container) == []


def test_a_payload_of_too_many_objects_is_a_difference(tmp_path: Path) -> None:
    def crowd(file: h5py.File) -> None:
        for i in range(1001):
            file.create_group(f"g{i}")

    (found,) = compare_with_hdf5(wrap(tmp_path / "c.h5", crowd))
    assert "more than 1,000 objects" in found


def test_the_child_limits_its_memory_and_its_time() -> None:
    resource = pytest.importorskip("resource")
    code = (
        "import resource; from featcache.cache import hdf5; hdf5._limit_resources()\n"
        "print([resource.getrlimit(k)[0] for k in (resource.RLIMIT_AS, resource.RLIMIT_CPU)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    memory, seconds = json.loads(done.stdout)
    assert 0 < memory <= 1 << 30
    assert 0 < seconds <= hdf5._CHECK_SECONDS
    with contextlib.suppress(ValueError):
        assert resource.getrlimit(resource.RLIMIT_AS)[0] != memory
