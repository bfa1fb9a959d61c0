"""SIGKILL of an extraction at random moments in every phase, then the same command again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from children import (
    TESTS,
    TINY,
    Result,
    all_arrays,
    names,
    noted_rows,
    wait_for,
    warm_parent,
)
from sample_images import write_tree

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills by Linux's /proc")

SHARD_ROWS = 8
LOST_IMAGES = 19  # at most, where batches of four are run: see ``work.vectors_per_shard``
SIZES = {"train": 30, "valid": 12, "test": 18}
NUM_IMAGES = 2 * sum(SIZES.values())
NUM_SHARDS = NUM_IMAGES // SHARD_ROWS
COMMAND = ("extract", "data", "c.h5", *TINY, "--batch-size", "4", "--workers", "2", "--json")
SMALL_SHARDS = ("small_shards", SHARD_ROWS, 4)


class Place(NamedTuple):
    """A folder with images, and what an uninterrupted run makes of them."""

    folder: Path
    arrays: dict[str, str]
    seconds: float
    num_calls: int

    @property
    def cache(self) -> Path:
        return self.folder / "c.h5"

    @property
    def partial(self) -> Path:
        return self.folder / "c.h5.partial"

    @property
    def notes(self) -> Path:
        return self.folder / "notes"


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    # A kill keeps what was written, so a folder in memory will do: fsync takes no time there.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        write_tree(folder / "data", SIZES)
        calls = folder / "calls"
        counting = ("at_call", folder / "c.h5", 0, calls)
        for _ in range(2):  # the first run warms the file cache
            (folder / "c.h5").unlink(missing_ok=True)
            start = time.perf_counter()
            result = warm_parent().run(*COMMAND, cwd=folder, before=(SMALL_SHARDS, counting))
            seconds = time.perf_counter() - start
            assert result.code == 0, result
        made = Place(folder, all_arrays(folder / "c.h5"), seconds, int(calls.read_text("ascii")))
        made.cache.unlink()
        calls.unlink()
        yield made


def clear(place: Place) -> None:
    place.notes.unlink(missing_ok=True)
    place.cache.unlink(missing_ok=True)


def phase(place: Place) -> str:
    """Tell from what is there in which phase a run was killed."""
    if place.cache.exists():
        return "while tidying up"
    if list(place.folder.glob(".c.h5.*")):
        return "in the final file"
    if not place.partial.exists():
        return "while scanning"
    if not (place.partial / "manifest.json").exists():
        return "choosing the engine"
    num_shards = len(list(place.partial.glob("shard.*")))
    return "in the shards" if num_shards < NUM_SHARDS else "after the last shard"


def start_and_kill(place: Place, rng: random.Random, way: str) -> Result:
    """Start the command and kill it in one of three ways; return what it left."""
    note = ("note", place.notes)
    if way == "call":
        deadly = ("at_call", place.cache, rng.randint(1, place.num_calls), "SIGKILL")
        return warm_parent().run(*COMMAND, cwd=place.folder, before=(SMALL_SHARDS, note, deadly))
    child = warm_parent().start(*COMMAND, cwd=place.folder, before=(SMALL_SHARDS, note))
    if way == "time":
        time.sleep(rng.uniform(0, place.seconds))
    else:
        wait_for(sign_of(place, rng), child)
        time.sleep(rng.uniform(0, 0.002))
    child.kill()
    return child.wait()


def sign_of(place: Place, rng: random.Random) -> Callable[[], object]:
    """Return a condition that shows that a run has come to some phase."""
    shard = place.partial / f"shard.{rng.randrange(NUM_SHARDS):05d}"
    signs: list[Callable[[], object]] = [
        (place.partial / "lock").exists,
        (place.partial / "manifest.json").exists,
        shard.exists,
        lambda: list(place.folder.glob(".c.h5.*.tmp")),
        place.cache.exists,
    ]
    return rng.choice(signs)


def check_killed(place: Place) -> None:
    """Check what a killed run left: nothing under the final name but a whole cache."""
    left = {name for name in names(place.folder) if not name.startswith(".c.h5.")}
    assert left <= {"data", "notes", "c.h5", "c.h5.partial"}
    if place.cache.exists():
        verified = warm_parent().run("verify", "c.h5", cwd=place.folder)
        assert verified.code == 0, verified


def finish(place: Place, num_kills: int) -> None:
    """Run the same command again, to its end: hardly anything is run twice, nothing differs."""
    acknowledged, num_run = (noted_rows(place.notes, word) for word in ("shard", "run"))
    result = warm_parent().run(*COMMAND, cwd=place.folder, before=(SMALL_SHARDS,))
    assert result.code == 0, result
    known = result.facts["num_known"]
    assert known + result.facts["num_new"] == NUM_IMAGES
    assert known >= acknowledged, "a shard that was acknowledged is lost"
    assert num_run - known <= num_kills * LOST_IMAGES, "more than a shard of work is lost"
    assert all_arrays(place.cache) == place.arrays
    place.notes.unlink(missing_ok=True)
    assert names(place.folder) == {"data", "c.h5"}, "something was left behind"


def test_killed_in_any_phase_it_loses_a_shard_at_most_and_ends_equal(
    place: Place, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    rng, wanted, total = random.Random(0), rounds(12, 500), 0
    while total < wanted:
        clear(place)
        num_kills = rng.choice([1, 1, 1, 1, 2, 3, 4])  # in a row, before it may end
        for _ in range(num_kills):
            total += 1
            way = ("time", "call", "time", "sign")[total % 4]
            result = start_and_kill(place, rng, way)
            assert result.code in {0, -signal.SIGKILL}, result
            tally("SIGKILL", "had ended" if result.code == 0 else phase(place))
            check_killed(place)
        finish(place, num_kills)


def test_killed_while_tidying_up_nothing_stays_behind(
    place: Place, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    """The cache is there already, its partial folder half removed: the last calls of a run."""
    for number in range(rounds(2, 40)):
        clear(place)
        deadly = ("at_call", place.cache, place.num_calls - number, "SIGKILL")
        result = warm_parent().run(*COMMAND, cwd=place.folder, before=(SMALL_SHARDS, deadly))
        assert result.code == -signal.SIGKILL
        tally("SIGKILL", phase(place))
        check_killed(place)
        finish(place, 1)


def test_the_real_command_killed_ends_equal(
    place: Place, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    """A new process, as users start it; its imports take longer than its work."""
    rng = random.Random(1)
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    command = [sys.executable, "-m", "featcache", *COMMAND]
    for number in range(rounds(1, 20)):
        clear(place)
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, cwd=place.folder, env=environment, stdout=pipe, stderr=pipe
        ) as child:
            if number % 2 == 1:
                time.sleep(rng.uniform(0, 1))
            else:
                deadline = time.monotonic() + 300
                while not place.partial.exists() and time.monotonic() < deadline:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, place.seconds))
            child.kill()
            _, err = child.communicate()
        assert child.returncode in {0, -signal.SIGKILL}, err
        tally("SIGKILL of a new process", "had ended" if child.returncode == 0 else phase(place))
        check_killed(place)
        finish(place, 1)
