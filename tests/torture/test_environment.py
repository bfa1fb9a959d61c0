"""Read-only folders, other users, HDF5's locks, and processes that may have only so much memory."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import TESTS, TINY, Preparation, Result, all_arrays, names, warm_parent
from sample_images import write_tree

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="users and limits of Linux")

COMMAND = ("extract", "data", "c.h5", *TINY, "--batch-size", "4", "--workers", "2", "--quiet")
TRAIN = ("train", "c.h5", "run", "--hidden", "8", "--epochs", "2", "--quiet")
NOBODY = 65534


class Place:
    """A folder that other users can reach, with images, a cache and a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "c.h5"
        folder.chmod(0o755)
        write_tree(folder / "data", {"train": 12, "valid": 5, "test": 6})
        for command in (COMMAND, TRAIN):
            result = self.run(*command)
            assert result.code == 0, result
        self.arrays = all_arrays(self.cache)

    def run(self, *arguments: object, before: tuple[Preparation, ...] = ()) -> Result:
        return warm_parent().run(*arguments, cwd=self.folder, before=before)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as name:
        yield Place(Path(name))


# --- read-only


@pytest.fixture
def stranger(place: Place) -> Iterator[tuple[Preparation, ...]]:
    """Make everything read-only; give what turns a child into a user to whom it is."""
    paths = [place.folder, *place.folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield (("become", NOBODY),) if os.geteuid() == 0 else ()
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def test_a_read_only_cache_is_read_verified_trained_on_and_up_to_date(
    place: Place, stranger: tuple[Preparation, ...]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        run, csv = Path(name) / "run", Path(name) / "rows.csv"
        # A new process may be beyond a stranger's reach: Python itself may be in root's folder.
        verify = [] if stranger else [("verify", "c.h5")]
        for command in (
            ("info", "c.h5"), *verify, COMMAND, (*TRAIN[:2], run, *TRAIN[3:]),
            ("evaluate", run), ("predict", "run", "--cache", "c.h5", "--csv", csv),
        ):  # fmt: skip
            result = place.run(*command, before=stranger)
            assert result.code == 0, (command, result)
        assert csv.is_file()


@pytest.mark.parametrize("command", [
    (*COMMAND, "--crop-mode", "border", "--rebuild"), ("extract", "data", "new.h5", *TINY),
    ("train", "c.h5", "new", "--epochs", "1"), (*TRAIN, "--overwrite"),
    ("split", "data/train", "tree"), ("split", "data/train", "rows.csv"),
    ("predict", "run", "--cache", "c.h5", "--csv", "rows.csv"),
    ("export", "run", "network.pt", "--backbone", TINY[1]),
], ids=lambda command: " ".join(command[:3]))  # fmt: skip
def test_what_cannot_be_written_is_one_line(
    place: Place, stranger: tuple[Preparation, ...], command: tuple[str, ...]
) -> None:
    before = names(place.folder)
    result = place.run(*command, before=stranger)
    assert re.search("ermission|read-only|cannot|writable", result.error()), result
    assert names(place.folder) == before
    assert all_arrays(place.cache) == place.arrays


# --- HDF5's locks: none of ours depends on them


@pytest.mark.parametrize("value", ["TRUE", "FALSE", "nonsense"])
def test_hdf5_locking_may_be_set_to_anything(place: Place, tmp_path: Path, value: str) -> None:
    setting = (("environment", "HDF5_USE_FILE_LOCKING", value),)
    cache = tmp_path / "c.h5"
    with place.cache.open("rb") as file:  # as if its file system could not lock
        fcntl.flock(file, fcntl.LOCK_EX)
        for command in (("verify", "c.h5"), ("extract", "data", cache, *COMMAND[3:])):
            result = place.run(*command, before=setting)
            assert result.code == 0, (command, result)
    assert all_arrays(cache) == place.arrays


# --- memory

NO_MEMORY = re.compile("(?i)memory|alloc")  # also of too many images that met none
ENDED_BY_C = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, 127, 134}


@pytest.mark.parametrize("command", [COMMAND, TRAIN], ids=["extract", "train"])
def test_too_little_memory_is_one_line_and_leaves_nothing_half(
    place: Place, tmp_path: Path, command: tuple[str, ...], rounds: Callable[..., Any],
    tally: Callable[..., None],
) -> None:  # fmt: skip
    """``ulimit -v`` from what the process has anyway, which never suffices, to more than enough."""
    shutil.copytree(place.folder / "data", tmp_path / "data")
    if command is TRAIN:
        shutil.copyfile(place.cache, tmp_path / "c.h5")
    before = names(tmp_path)
    codes = {}
    for more in rounds((0, 4, 32, 4096), (0, 2, 4, 8, 32, 64, 160, 300, 4096)):
        limited = ("memory", more << 20)
        result = warm_parent().run(*command, cwd=tmp_path, before=(limited,))
        new = names(tmp_path) - before
        if result.code == 0:
            outcome = "enough"
        elif result.code == 1:
            outcome = "an error line"
            assert NO_MEMORY.search(result.error()), result
        else:  # a C library ended the process itself
            assert result.code in ENDED_BY_C, result
            outcome = "ended by a C library"
        assert "Traceback" not in result.err, result
        tally("memory", f"{command[0]}: {outcome}")
        codes[more] = result.code
        if result.code:
            assert new <= {"c.h5.partial", "run.partial"}
        else:
            assert new == {"c.h5" if command is COMMAND else "run"}
            if "could not be read" not in result.err:  # an image or two: said, and listed
                assert_whole(place, tmp_path, command)
        for name in new - {"c.h5.partial", "run.partial"}:
            path = tmp_path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert codes[0] != 0, "the limit limits nothing"
    assert codes[4096] == 0, "it was not memory that was missing"
    result = warm_parent().run(*command, cwd=tmp_path)
    assert result.code == 0, result
    assert_whole(place, tmp_path, command)


def assert_whole(place: Place, folder: Path, command: tuple[str, ...]) -> None:
    """What a command that says it is done has made is what it makes with all the memory."""
    if command is COMMAND:
        assert all_arrays(folder / "c.h5") == place.arrays
    else:
        made, wanted = (f / "run" / "head.safetensors" for f in (folder, place.folder))
        assert made.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("megabytes", [200, 500])
def test_a_new_process_with_too_little_memory_to_begin_is_one_line(
    place: Place, tmp_path: Path, megabytes: int, tally: Callable[..., None]
) -> None:
    """Libraries that cannot be loaded for want of memory are no traceback either."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    done = subprocess.run(
        [sys.executable, "-m", "featcache", *COMMAND[:2], tmp_path / "c.h5", *COMMAND[3:]],
        cwd=place.folder, preexec_fn=limit, capture_output=True, text=True, check=False,
        env=os.environ | {
            "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
    )  # fmt: skip
    # torch alone maps more: the loader of libraries says so, and nothing crashes
    said = Result(done.returncode, done.stdout, done.stderr).error()
    assert said.startswith("error: memory: expected enough, found ")
    tally("memory", "new process: an error line")
    assert names(tmp_path) == set()
