"""A signal finishes the shard in hand and says how far it got; a second one ends at once."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from children import TINY, Result, all_arrays, names, noted_rows, wait_for, warm_parent
from sample_images import write_tree

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")

SIZES = {"train": 20, "valid": 8, "test": 12}
NUM_IMAGES = 2 * sum(SIZES.values())
COMMAND = ("extract", "data", "c.h5", *TINY, "--batch-size", "4", "--workers", "2", "--json")
SMALL_SHARDS = ("small_shards", 8, 4)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class Place:
    """A folder with images, and what an uninterrupted run makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache, self.notes = folder, folder / "c.h5", folder / "notes"
        write_tree(folder / "data", SIZES)
        counting = ("at_call", self.cache, 0, folder / "calls")
        result = warm_parent().run(*COMMAND, cwd=folder, before=(SMALL_SHARDS, counting))
        assert result.code == 0, result
        self.num_calls = int((folder / "calls").read_text("ascii"))
        self.arrays = all_arrays(self.cache)
        (folder / "calls").unlink()

    def finish(self) -> Result:
        """Run the same command again: it ends equal, and nothing stays behind."""
        result = warm_parent().run(*COMMAND, cwd=self.folder, before=(SMALL_SHARDS,))
        assert result.code == 0, result
        assert all_arrays(self.cache) == self.arrays
        self.notes.unlink(missing_ok=True)
        assert names(self.folder) == {"data", "c.h5"}
        return result


@pytest.fixture(scope="module")
def whole() -> Iterator[Place]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Place(Path(name))


@pytest.fixture
def place(whole: Place) -> Place:
    whole.cache.unlink(missing_ok=True)
    whole.notes.unlink(missing_ok=True)
    return whole


def assert_one_line(result: Result, number: signal.Signals) -> str:
    assert result.code == CODES[number], result
    assert "Traceback" not in result.err
    said = result.err.strip()  # click begins a new line after the terminal's ^C
    assert len(said.splitlines()) == 1, result
    return said


@pytest.mark.parametrize("number", CODES)
def test_the_first_signal_keeps_what_is_in_hand_and_says_how_much(
    place: Place, number: signal.Signals, tally: Callable[..., None]
) -> None:
    before = (SMALL_SHARDS, ("slow", 0.02), ("note", place.notes), ("end_for_real",))
    child = warm_parent().start(*COMMAND, cwd=place.folder, before=before)
    # 20 images: two shards are whole, and of the third there is half
    assert wait_for(lambda: noted_rows(place.notes, "taken") >= 20, child)
    child.kill(number)
    said = assert_one_line(child.wait(), number)
    found = re.search(rf"interrupted: (\d+) of {NUM_IMAGES} images kept in c.h5.partial", said)
    assert found, said
    kept = int(found[1])
    # What was taken before the signal is in a shard; the note of the last batch may be missing.
    assert noted_rows(place.notes, "taken") <= kept < NUM_IMAGES
    assert noted_rows(place.notes, "shard") == kept
    assert not place.cache.exists()
    tally("interrupts", f"{number.name}, finished the shard in hand")
    facts = place.finish().facts
    assert (facts["num_known"], facts["num_new"]) == (kept, NUM_IMAGES - kept)


@pytest.mark.parametrize("number", CODES)
def test_the_second_signal_ends_it_at_once(
    place: Place, number: signal.Signals, tally: Callable[..., None]
) -> None:
    """The batch in hand never comes: only who does not wait for it can end."""
    gate = place.folder / "never"
    reached = place.folder / "never.reached"
    child = warm_parent().start(
        *COMMAND, cwd=place.folder, before=(SMALL_SHARDS, ("gate", gate))
    )  # fmt: skip
    assert wait_for(reached.exists, child)
    reached.unlink()
    child.kill(number)
    time.sleep(0.3)
    assert child.is_running(), "the first does not wait for the batch in hand"
    deadline = time.monotonic() + 300
    while child.is_running() and time.monotonic() < deadline:
        child.kill(number)  # the next ones
        time.sleep(0.1)
    if child.is_running():
        child.kill()
    result = child.wait()
    assert result.code == CODES[number], result
    assert "Traceback" not in result.err
    tally("interrupts", f"second {number.name} at once")
    place.finish()


@pytest.mark.skipif(sys.platform != "linux", reason="counts calls by Linux's /proc")
def test_interrupted_before_any_call_it_ends_clean_and_goes_on(
    place: Place, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    """Not only while images stream: also with the lock just taken, and in the final file."""
    rng = random.Random(0)
    for round_number in range(rounds(6, 200)):
        place.cache.unlink(missing_ok=True)
        number = list(CODES)[round_number % 3]
        # half of them at the first and last calls: nearly all others are of shards
        call = rng.choice([
            rng.randint(1, place.num_calls), rng.randint(1, 6),
            rng.randint(place.num_calls - 20, place.num_calls),
        ])  # fmt: skip
        when = ("at_call", place.cache, call, number.name)
        result = warm_parent().run(*COMMAND, cwd=place.folder, before=(SMALL_SHARDS, when))
        assert result.code == CODES[number], (call, result)
        assert "Traceback" not in result.err, result
        assert len(result.err.strip().splitlines()) == 1, result
        assert names(place.folder) <= {"data", "c.h5", "c.h5.partial"}, "a temporary was left"
        assert not list(place.folder.glob("c.h5.partial/.*"))
        tally("interrupts", f"{number.name} at some call")
        place.finish()
