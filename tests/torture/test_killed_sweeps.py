"""SIGKILL of a sweep at random moments and before any change on the disk, then the same again."""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from children import Result, names, warm_parent
from sample_sweeps import run_files, small_cache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills by Linux's /proc")

NUM_TRIALS = 36  # two rounds of random trials, three of tpe
COMMAND = (
    "sweep", "c.h5", "best", "--trials", NUM_TRIALS, "--space", "s.toml", "--repeats", 2,
    "--device", "cpu", "--json",
)  # fmt: skip


class Place(NamedTuple):
    """A folder with a cache, and what an uninterrupted sweep makes of it."""

    folder: Path
    sampler: str
    files: dict[str, bytes]
    num_steps: int
    num_calls: int
    seconds: float

    @property
    def journal(self) -> Path:
        return self.folder / "best.sweep" / "journal.jsonl"

    def run(self, *before: Any) -> Result:
        arguments = (*COMMAND, "--sampler", self.sampler)
        return warm_parent().run(*arguments, cwd=self.folder, before=before)


@pytest.fixture(scope="module", params=["random", "tpe"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_cache(folder)
        started = Place(folder, request.param, {}, 0, 0, 0.0)
        start = time.perf_counter()
        whole = started.run(("at_call", folder / "best", 0, folder / "calls"))
        seconds = time.perf_counter() - start
        num_calls = int((folder / "calls").read_text("ascii"))
        (folder / "calls").unlink()
        num_steps = whole.facts["num_head_steps"]
        yield started._replace(
            files=run_files(folder / "best"), num_steps=num_steps, num_calls=num_calls,
            seconds=seconds,
        )  # fmt: skip


def kill(place: Place, rng: random.Random, number: int | None) -> bool:
    """Run the command and kill it before call ``number``, or some time; return whether it was."""
    if number is not None:
        result = place.run(("at_call", place.folder / "best", number, "SIGKILL"))
    else:
        arguments = (*COMMAND, "--sampler", place.sampler)
        child = warm_parent().start(*arguments, cwd=place.folder)
        time.sleep(rng.uniform(0.1, 1) * place.seconds)
        child.kill()
        result = child.wait()
    assert result.code in {0, -9}, result
    return result.code == -9


def phase(place: Place) -> str:
    """Tell from what is there how far a sweep came."""
    entries = noted(place)
    if (place.folder / "best").exists():
        return "while tidying up"
    if (place.folder / "best.partial" / "new" / "head.safetensors").exists():
        return "writing the run"
    if not entries:
        return "before the first round ended"
    return "in the repeats" if count_trials(entries) == NUM_TRIALS else "between rounds"


def noted(place: Place) -> list[Any]:
    """Return the whole entries of the journal."""
    if not place.journal.exists():
        return []
    lines = place.journal.read_bytes().split(b"\n")[1:-1]
    return [json.loads(line) for line in lines]


def count_trials(entries: list[Any]) -> int:
    return sum(len(entry.get("trials", [])) for entry in entries)


def is_over(place: Place) -> bool:
    return (place.folder / "best").exists() and not place.journal.exists()


def test_a_sweep_killed_at_any_moment_ends_as_if_it_was_not(
    place: Place, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    rng = random.Random(5)
    few = 2 if place.sampler == "random" else 1
    calls = rng.sample(range(1, place.num_calls + 1), rounds(few, place.num_calls))
    moments: list[int | None] = [*calls, *[None] * rounds(few - 1, 60)]
    for moment in moments:
        shutil.rmtree(place.folder / "best", ignore_errors=True)
        shutil.rmtree(place.folder / "best.sweep", ignore_errors=True)
        was_killed = kill(place, rng, moment)
        if was_killed:
            tally("sweep killed", phase(place))
        if not is_over(place) and rng.random() < 0.3 and kill(place, rng, rng.randint(1, 12)):
            tally("sweep killed", "again, on its way from there")
        if is_over(place):  # nothing is left to do; a lock that nobody holds means nothing
            assert names(place.folder) <= {"c.h5", "s.toml", "best", "best.sweep"}
        else:
            entries = noted(place)
            again = place.run()
            assert again.code == 0, (moment, again)
            # What was noted is not done again; a round that was not is, from its beginning.
            assert (again.facts["num_head_steps"] == place.num_steps) == (not entries), moment
            assert names(place.folder) == {"c.h5", "s.toml", "best"}, moment
        with (place.folder / "best" / "trials.csv").open(newline="", encoding="utf-8") as file:
            numbers = [int(row["trial"]) for row in csv.DictReader(file)]
        assert numbers == list(range(NUM_TRIALS)), moment
        assert run_files(place.folder / "best") == place.files, moment
