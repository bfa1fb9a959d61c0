"""Full disks for real: a tmpfs filled to some level, and a limit on the size of files."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from children import TINY, Preparation, Result, all_arrays, names, warm_parent
from sample_images import write_image, write_tree

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tmpfs and limits of Linux")

SIZES = {"train": 30, "valid": 12, "test": 18}
OPTIONS = (*TINY, "--batch-size", "4", "--workers", "2", "--quiet")
SMALL_SHARDS = ("small_shards", 8, 4)
PAGE = os.sysconf("SC_PAGE_SIZE")
LEVELS = {  # pages that are free: none for the lock, none for a shard ..., almost enough
    "new cache": (0, 1, 2, 3, 6, 10, 14, 18, 20, 22, 24), "update": (0, 1, 2, 3, 4, 5, 6, 8, 10),
}  # fmt: skip
DISK_BYTES = 1 << 20


class Place:
    """Images, a larger set of them, and what their caches hold; on a disk with room."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.old, self.new = folder / "old", folder / "new"
        write_tree(self.old, SIZES)
        shutil.copytree(self.old, self.new)
        for number in range(40):
            label = ("covid", "normal")[number % 2]
            write_image(self.new / "train" / label / f"more{number}.png", 1000 + number)
        self.arrays = {}
        for data in (self.old, self.new):
            cache = folder / f"{data.name}.h5"
            result = self.run("extract", data, cache, *OPTIONS)
            assert result.code == 0, result
            self.arrays[data] = all_arrays(cache)
        result = self.run("train", "old.h5", "run", "--hidden", "8", "--epochs", "2")
        assert result.code == 0, result

    def phase(self, num_shards: int, is_update: bool) -> str:
        if num_shards == 0:
            return "before a shard"
        num_rows = 40 if is_update else 2 * sum(SIZES.values())
        return "in the shards" if num_shards * 8 < num_rows else "in the final file"

    def run(self, *arguments: object, before: tuple[Preparation, ...] = ()) -> Result:
        return warm_parent().run(*arguments, cwd=self.folder, before=before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free_bytes: int) -> None:
    """Leave so many bytes free."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    space = os.statvfs(disk)
    ballast.write_bytes(b"x" * max(0, space.f_bavail * space.f_bsize - free_bytes))


def assert_says_how_much(result: Result) -> None:
    """One line, and in it the bytes needed and the bytes free, of which the first are more."""
    found = re.search(
        r"disk space: expected ([\d,]+) bytes, found ([\d,]+) bytes free", result.error()
    )
    assert found, result
    needed, free = (int(number.replace(",", "")) for number in found.groups())
    assert needed > free, result


@pytest.mark.parametrize("is_update", [False, True], ids=["new cache", "update"])
def test_a_full_disk_is_one_line_and_after_making_room_the_same_command_ends_equal(
    place: Place, disk: Path, is_update: bool, rounds: Callable[[int, int], int],
    tally: Callable[..., None],
) -> None:  # fmt: skip
    data = place.new if is_update else place.old
    cache = disk / "c.h5"
    levels = LEVELS["update" if is_update else "new cache"]
    for free_pages in levels[:: rounds(4, 1)]:
        cache.unlink(missing_ok=True)
        if is_update:
            fill(disk, DISK_BYTES)
            shutil.copyfile(place.folder / "old.h5", cache)
        fill(disk, free_pages * PAGE)
        before = names(disk)
        result = place.run(
            "extract", data, cache, *OPTIONS, before=(SMALL_SHARDS, ("end_for_real",))
        )
        assert_says_how_much(result)
        left = names(disk)
        if is_update:
            assert all_arrays(cache) == place.arrays[place.old], "the old cache is not whole"
        assert left - before <= {"c.h5.partial"}
        shards = list(disk.glob("c.h5.partial/shard.*"))
        assert ("c.h5.partial" in left) == bool(shards), "nothing was gained, and it stayed"
        assert not list(disk.glob("c.h5.partial/.*")), "a temporary was left behind"
        tally("full disk", place.phase(len(shards), is_update))

        fill(disk, DISK_BYTES)
        again = place.run("extract", data, cache, *OPTIONS, before=(SMALL_SHARDS,))
        assert again.code == 0, again
        assert all_arrays(cache) == place.arrays[data]
        assert names(disk) == {"ballast", "c.h5"}


def test_files_of_a_limited_size_are_one_line_and_without_the_limit_it_ends_equal(
    place: Place, tmp_path: Path, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    """What ``ulimit -f`` or a quota does; needs no root."""
    cache = tmp_path / "c.h5"
    rng = random.Random(0)
    limits = [600, *sorted(rng.randrange(600, cache_bytes(place)) for _ in range(rounds(1, 3)))]
    for limit in limits:
        limited = ("limit", "RLIMIT_FSIZE", limit)
        result = place.run(
            "extract", place.old, cache, *OPTIONS, before=(SMALL_SHARDS, ("end_for_real",), limited)
        )
        assert "error: file size: expected" in result.error()
        assert names(tmp_path) <= {"c.h5.partial"}
        assert not list(tmp_path.glob("c.h5.partial/.*"))
        tally("full disk", "limit of file sizes")
    again = place.run("extract", place.old, cache, *OPTIONS, before=(SMALL_SHARDS,))
    assert again.code == 0, again
    assert all_arrays(cache) == place.arrays[place.old]
    assert names(tmp_path) == {"c.h5"}


def cache_bytes(place: Place) -> int:
    return (place.folder / "old.h5").stat().st_size


COMMANDS = {
    "train": ("train", "{place}/old.h5", "{disk}/run", "--hidden", "8", "--epochs", "1"),
    "overwrite": ("train", "{place}/old.h5", "{disk}/old", "--hidden", "8", "--overwrite"),
    "evaluate": ("evaluate", "{disk}/old", "--cache", "{place}/old.h5", "--csv", "{disk}/rows.csv"),
    "export": ("export", "{place}/run", "{disk}/network.pt", "--backbone", TINY[1]),
    "predict": ("predict", "{place}/run", "--cache", "{place}/old.h5", "--csv", "{disk}/rows.csv"),
    "split to a tree": ("split", "{place}/old/train", "{disk}/tree"),
    "split to a manifest": ("split", "{place}/old/train", "{disk}/rows.csv"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands_on_a_full_disk_are_one_line_and_leave_what_was_there(
    place: Place, disk: Path, name: str, rounds: Callable[[int, int], int],
    tally: Callable[..., None],
) -> None:  # fmt: skip
    shutil.copytree(place.folder / "run", disk / "old")
    arguments = [part.format(place=place.folder, disk=disk) for part in COMMANDS[name]]
    for free_pages in (0, 1, 2)[: rounds(2, 3)]:
        fill(disk, free_pages * PAGE)
        before = contents(disk)
        result = place.run(*arguments, before=(("end_for_real",),))
        if result.code == 0:  # what it writes is small
            assert free_pages
            break
        result.error()
        assert contents(disk) == before
        tally("full disk", name)
    fill(disk, DISK_BYTES)
    if result.code:
        again = place.run(*arguments)
        assert again.code == 0, again


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, and folders as empty ones."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }
