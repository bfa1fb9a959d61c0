"""Power cuts: ext4 on a loop device, shut down so that nothing more reaches the disk.

What was written but not synced is lost then, as by a real cut: xfstests' ``godown`` does the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from children import TINY, Child, all_arrays, names, noted_rows, wait_for, warm_parent
from sample_images import write_image, write_tree

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ext4 and loop devices of Linux")

SHARD_ROWS = 8
SIZES = {"train": 30, "valid": 12, "test": 18}
NUM_IMAGES = 2 * sum(SIZES.values())
NUM_ADDED = 24
OPTIONS = (*TINY, "--batch-size", "4", "--workers", "2", "--json")
SMALL_SHARDS = ("small_shards", SHARD_ROWS, 4)

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_WITHOUT_LOG_FLUSH = 2


class Disk:
    """A small ext4 of its own, whose power can be cut."""

    def __init__(self, image: Path, folder: Path) -> None:
        self._image, self.folder = image, folder
        with image.open("wb") as file:
            file.truncate(64 << 20)
        _run("mkfs.ext4", "-q", "-F", str(image))
        folder.mkdir()
        self.mount()

    def mount(self) -> None:
        # commit: what is not synced must not be saved by the journal's timer
        _run("mount", "-o", "loop,commit=600", str(self._image), str(self.folder))

    def unmount(self) -> None:
        _run("umount", str(self.folder))  # and the loop device goes with it

    def cut(self) -> None:
        """Cut the power: from now on every call on the disk fails, and nothing is written."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG_FLUSH))
        finally:
            os.close(handle)

    def close(self) -> None:
        """Leave no mount and no loop device, whatever has happened."""
        subprocess.run(["umount", str(self.folder)], capture_output=True, check=False)
        if self.folder.is_mount():  # somebody still has a file open there
            subprocess.run(["umount", "--lazy", str(self.folder)], capture_output=True, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def disk() -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("power cuts need root: a loop device is mounted")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name, contextlib.ExitStack() as stack:
        try:
            made = Disk(Path(name) / "disk", Path(name) / "mounted")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no ext4 on a loop device here: {error}")
        stack.callback(made.close)
        try:
            made.cut()
        except OSError as error:
            pytest.skip(f"this kernel's ext4 cannot be shut down: {error}")
        made.unmount()
        made.mount()
        yield made


class Truth:
    """Two states of a data set, what its cache holds in each, and how long that takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.old, self.new = folder / "old", folder / "new"
        write_tree(self.old, SIZES)
        shutil.copytree(self.old, self.new)  # keeps sizes and times: these images are known
        for number in range(NUM_ADDED):
            label = ("covid", "normal")[number % 2]
            write_image(self.new / "train" / label / f"more{number}.png", 1000 + number)
        self.arrays = {}
        for data in (self.old, self.new):
            start = time.perf_counter()
            cache = folder / f"{data.name}.h5"
            counting = ("at_call", cache, 0, folder / "calls")
            result = warm_parent().run(
                "extract", data, cache, *OPTIONS, cwd=folder, before=(SMALL_SHARDS, counting)
            )
            assert result.code == 0, result
            self.seconds = time.perf_counter() - start
            self.num_calls = int((folder / "calls").read_text("ascii"))
            self.arrays[data] = all_arrays(cache)


@pytest.fixture(scope="module")
def truth(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(tmp_path_factory.mktemp("truth"))


def cut_while_writing(disk: Disk, cache: Path, child: Child, moment: str, seconds: float) -> None:
    """Cut the power at some moment of a run, and take the machine's processes with it."""
    if moment == "time":
        time.sleep(seconds)
    elif moment == "final":  # its file is being written
        wait_for(lambda: list(cache.parent.glob(f".{cache.name}.*")), child)
        time.sleep(seconds / 500)
    else:  # the child has stopped before one of its calls, or ends without getting there
        wait_for(child.is_stopped, child)
    disk.cut()
    child.kill()
    child.wait()
    disk.unmount()
    disk.mount()


@pytest.mark.parametrize("is_update", [False, True], ids=["new cache", "update"])
def test_a_power_cut_loses_no_listed_shard_and_publishes_no_partial_file(
    disk: Disk, truth: Truth, is_update: bool, rounds: Callable[[int, int], int],
    tally: Callable[..., None],
) -> None:  # fmt: skip
    rng = random.Random(int(is_update))
    data = truth.new if is_update else truth.old
    for number in range(rounds(5, 150)):
        place = disk.folder / f"{is_update}{number}"
        place.mkdir()
        cache, notes = place / "c.h5", truth.folder / "notes"
        notes.unlink(missing_ok=True)
        if is_update:
            shutil.copyfile(truth.folder / "old.h5", cache)
        os.sync()
        moment = ("time", "call", "final", "call", "time")[number % 5]
        before = [SMALL_SHARDS, ("note", notes)]
        num_new = NUM_ADDED if is_update else NUM_IMAGES
        share = num_new / (NUM_IMAGES + NUM_ADDED)
        if moment == "call":
            stop_at = rng.randint(1, max(1, round(share * truth.num_calls)))
            before.append(("at_call", cache, stop_at, "SIGSTOP"))
        child = warm_parent().start(
            "extract", data, cache, *OPTIONS, cwd=truth.folder, before=tuple(before)
        )
        cut_while_writing(disk, cache, child, moment, rng.uniform(0, share * truth.seconds))

        left = names(place)
        assert {name for name in left if not name.startswith(".c.h5.")} <= {"c.h5", "c.h5.partial"}
        outcome = "no cache yet"
        if cache.exists():  # whole, and one of the two
            found = all_arrays(cache)
            assert found in ((truth.arrays[truth.old],) if not is_update else truth.arrays.values())
            outcome = "new cache whole" if found == truth.arrays[data] else "old cache whole"
        else:
            assert not is_update, "the old cache is gone"
        tally("power cut", outcome)
        acknowledged = noted_rows(notes, "shard")
        result = warm_parent().run(
            "extract", data, cache, *OPTIONS, cwd=truth.folder, before=(SMALL_SHARDS,)
        )
        assert result.code == 0, result
        known = result.facts["num_known"] - (NUM_IMAGES if is_update else 0)
        assert known >= acknowledged, "an acknowledged shard is lost"
        assert all_arrays(cache) == truth.arrays[data]
        assert names(place) == {"c.h5"}, "something was left behind"
        shutil.rmtree(place)


def test_a_cache_that_was_reported_done_survives_a_cut_at_once(
    disk: Disk, truth: Truth, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    """Exit code 0 is the promise that it is on the disk; without the folder's fsync it is not."""
    for number in range(rounds(2, 20)):
        place = disk.folder / f"done{number}"
        place.mkdir()
        os.sync()
        result = warm_parent().run("extract", truth.old, place / "c.h5", *OPTIONS, cwd=truth.folder)
        assert result.code == 0, result
        disk.cut()
        disk.unmount()
        disk.mount()
        assert all_arrays(place / "c.h5") == truth.arrays[truth.old]
        tally("power cut", "done, and there")
        shutil.rmtree(place)
