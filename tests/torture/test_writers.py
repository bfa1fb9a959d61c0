"""Several writers of one cache, readers during writes, the death of the lock's holder."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from children import TINY, Child, all_arrays, names, wait_for, warm_parent
from sample_images import write_image, write_tree

from featcache.cache.reading import open_cache
from featcache.errors import CacheError
from featcache.heads.run import load_run
from featcache.locking import writer_lock

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stops and kills by Linux's /proc")

SIZES = {"train": 12, "valid": 5, "test": 6}
NUM_IMAGES = 2 * sum(SIZES.values())
NUM_ADDED = 10
OPTIONS = (*TINY, "--batch-size", "4", "--workers", "2", "--json")
SMALL_SHARDS = ("small_shards", 8, 4)


class Place:
    """A folder with images, more images, and their caches."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "c.h5"
        self.partial = folder / "c.h5.partial"
        write_tree(folder / "old", SIZES)
        shutil.copytree(folder / "old", folder / "new")
        for number in range(NUM_ADDED):
            write_image(folder / "new" / "train" / "covid" / f"more{number}.png", 1000 + number)
        self.arrays, self.num_calls = {}, {}
        for data in ("old", "new"):  # the new one as an update of the old one
            counting = ("at_call", self.cache, 0, folder / "calls")
            result = warm_parent().run(
                "extract", data, "c.h5", *OPTIONS, cwd=folder, before=(SMALL_SHARDS, counting)
            )
            assert result.code == 0, result
            self.num_calls[data] = int((folder / "calls").read_text("ascii"))
            shutil.copyfile(self.cache, folder / f"{data}.h5")
            self.arrays[data] = all_arrays(self.cache)
        (folder / "calls").unlink()
        self.cache.unlink()
        self.names = names(folder)

    def start(self, data: str, *before: tuple[object, ...], options: tuple[str, ...] = ()) -> Child:
        arguments = ("extract", data, "c.h5", *OPTIONS, *options)
        return warm_parent().start(*arguments, cwd=self.folder, before=(SMALL_SHARDS, *before))

    def reset(self, *, old: bool = False) -> None:
        """Start with no cache, or with the old one."""
        self.cache.unlink(missing_ok=True)
        if old:
            shutil.copyfile(self.folder / "old.h5", self.cache)

    def assert_tidy(self) -> None:
        assert names(self.folder) == {*self.names, "c.h5"}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Place(Path(name))


# --- writers


def test_of_many_writers_one_wins_and_the_others_are_told_who(
    place: Place, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    rng = random.Random(0)
    for _ in range(rounds(4, 40)):
        place.reset()
        gate = place.folder / "gate"
        writers = [place.start("old", ("gate", gate)) for _ in range(rng.randint(2, 8))]
        # The winner waits at the gate, so that none of the others can come when it is done.
        wait_for(partial(one_is_left, writers), None)
        (winner,) = (writer for writer in writers if writer.is_running())
        told = f"one at work: process {winner.pid} on {socket.gethostname()} since 2"
        for writer in writers:
            if writer is not winner:
                result = writer.wait()
                assert told in result.error()
                tally("writers", "told who is at work")
        gate.touch()
        result = winner.wait()
        assert result.code == 0, result
        assert result.facts["num_new"] == NUM_IMAGES
        tally("writers", "winner")
        gate.unlink()
        (place.folder / "gate.reached").unlink()
        assert all_arrays(place.cache) == place.arrays["old"]
        place.assert_tidy()


def one_is_left(writers: list[Child]) -> bool:
    return sum(writer.is_running() for writer in writers) == 1


def test_a_writer_that_comes_while_another_tidies_up_does_no_harm(
    place: Place, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    """The first is stopped at its last calls: it removes the folder that holds the lock."""
    for number in range(rounds(3, 13)):
        place.reset()
        first = place.start(
            "old", ("at_call", place.cache, place.num_calls["old"] - number, "SIGSTOP")
        )
        assert wait_for(first.is_stopped, first)
        second = place.start("old").wait()
        assert second.code in {0, 1}, second
        if second.code == 1:
            assert f"process {first.pid} on " in second.error()
        else:
            assert second.facts["num_new"] == 0, "the cache was there already"
        tally("writers", "while another tidies up")
        first.kill(signal.SIGCONT)
        assert first.wait().code == 0
        assert all_arrays(place.cache) == place.arrays["old"]
        third = place.start("old").wait()
        assert third.facts["status"] == "up to date"
        place.assert_tidy()


def test_a_lock_file_removed_before_it_was_locked_is_not_taken_for_a_lock(
    place: Place, tally: Callable[..., None]
) -> None:
    """The first ends and removes the file that the second has opened; a third makes a new one."""
    place.reset()
    lock = place.partial / "lock"
    gates = [place.folder / "gate1", place.folder / "gate3"]
    first = place.start("old", ("gate", gates[0]))
    assert wait_for(partial(is_signed, lock, first.pid), first)
    second = place.start("old", ("stop_before_lock",))
    assert wait_for(second.is_stopped, second)
    gates[0].touch()
    assert first.wait().code == 0
    place.reset()
    third = place.start("old", ("gate", gates[1]))
    assert wait_for(partial(is_signed, lock, third.pid), third)
    second.kill(signal.SIGCONT)
    assert f"process {third.pid} on " in second.wait().error(), "two writers at once"
    gates[1].touch()
    assert third.wait().code == 0
    for left in place.folder.glob("gate*"):
        left.unlink()
    assert all_arrays(place.cache) == place.arrays["old"]
    place.assert_tidy()
    tally("writers", "of a lock that was removed")


def test_a_cache_that_appears_before_the_lock_is_had_is_seen(place: Place) -> None:
    """Looked for before the lock is had, it may be made meanwhile: once had, it must be seen."""
    other = ["extract", "old", "c.h5", *TINY, "--batch-size", "4", "--quiet"]
    then = ("after", "cache_lock", other, "featcache.extraction.plan")
    place.reset()
    result = place.start("old", then).wait()
    assert result.code == 0, result
    assert result.facts["num_new"] == 0
    place.assert_tidy()

    place.reset()
    result = place.start("old", then, options=("--crop-mode", "border")).wait()
    assert "--rebuild" in result.error(), "a cache of another identity was replaced unasked"
    assert all_arrays(place.cache) == place.arrays["old"]


# --- readers


def test_readers_during_an_update_see_the_old_cache_or_the_new_one(
    place: Place, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    """The writer is stopped before one of its calls, and everything is read meanwhile."""
    num_calls = place.num_calls["new"]
    num_rounds = rounds(6, num_calls)
    for number in range(num_rounds):
        place.reset(old=True)
        features = open_cache(place.cache).split("train").features
        before = features.copy()
        stop_at = num_calls - round(number * (num_calls - 1) / (num_rounds - 1))
        writer = place.start("new", ("at_call", place.cache, stop_at, "SIGSTOP"))
        assert wait_for(writer.is_stopped, writer)
        found = all_arrays(place.cache)
        assert found in place.arrays.values(), "a torn cache"
        tally("readers", "old" if found == place.arrays["old"] else "new")
        if number % 5 == 0:
            trained = warm_parent().run(
                "train", "c.h5", "run", "--hidden", "8", "--epochs", "1", cwd=place.folder
            )
            assert trained.code == 0, trained
            run = load_run(place.folder / "run")
            assert run.cache["payload_sha256"] == open_cache(place.cache).payload_sha256
            shutil.rmtree(place.folder / "run")
        writer.kill(signal.SIGCONT)
        assert writer.wait().code == 0
        assert all_arrays(place.cache) == place.arrays["new"]
        assert np.array_equal(features, before), "who has it open keeps it"
        place.assert_tidy()


def test_readers_without_a_pause_never_see_a_torn_cache(
    place: Place, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    for _ in range(rounds(2, 40)):
        place.reset(old=True)
        writer = place.start("new")
        while writer.is_running():
            try:
                found = all_arrays(place.cache)
            except CacheError as error:  # replaced between opening and reading
                assert "Open it again" in str(error)  # noqa: PT017
                tally("readers", "told to open it again")
                continue
            assert found in place.arrays.values(), "a torn cache"
            tally("readers", "old" if found == place.arrays["old"] else "new")
        assert writer.wait().code == 0


# --- the lock


def test_the_lock_is_free_when_its_holder_is_killed(
    place: Place, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    place.reset()
    gate, lock = place.folder / "gate", place.partial / "lock"
    for _ in range(rounds(5, 200)):
        holder = place.start("old", ("gate", gate))
        assert wait_for(partial(is_signed, lock, holder.pid), holder)
        holder.kill()
        holder.wait()
        # A decoder that the holder was just starting may have the file open for a moment more.
        wait_for(partial(is_free, lock), None)
        with writer_lock(lock, "cache"):
            tally("lock's holder killed", "free")
    assert place.start("old").wait().code == 0
    (place.folder / "gate.reached").unlink(missing_ok=True)
    assert all_arrays(place.cache) == place.arrays["old"]
    place.assert_tidy()


def is_free(lock: Path) -> bool:
    with lock.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def is_signed(lock: Path, pid: int) -> bool:
    return lock.exists() and lock.read_text("ascii").startswith(f"process {pid} on ")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_files_cannot_be_locked_it_says_so(place: Place, code: int) -> None:
    place.reset()
    result = place.start("old", ("no_locks", code)).wait()
    assert "a file system that can lock files" in result.error()
    assert os.strerror(code) in result.err
    assert not place.cache.exists()
    shutil.rmtree(place.partial)


@pytest.mark.parametrize("kind", ["folder", "pipe", "file", "link", "dangling link", "read-only"])
def test_a_lock_file_that_is_not_ours_is_one_line_and_is_left_alone(
    place: Place, kind: str
) -> None:
    place.reset()
    place.partial.mkdir()
    lock, mine = place.partial / "lock", place.folder / "mine"
    before = [("become", 65534)] if kind == "read-only" and os.geteuid() == 0 else []
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "file":
        lock.write_text("years of work")
    elif kind == "read-only":
        lock.touch(0o444)
        place.folder.chmod(0o777)
        place.partial.chmod(0o777)
    else:
        lock.symlink_to(mine)
        if kind == "link":
            mine.write_text("years of work")
    result = place.start("old", *before).wait()
    assert "lock of cache c.h5: expected" in result.error()
    assert str(lock.relative_to(place.folder)) in result.err
    if kind == "file":
        assert lock.read_text() == "years of work"
    if kind == "link":
        assert mine.read_text() == "years of work"
        mine.unlink()
    assert not mine.exists()
    shutil.rmtree(place.partial)
