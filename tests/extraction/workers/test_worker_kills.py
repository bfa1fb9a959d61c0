"""Workers, coordinators, parts and merges are killed: the arrays are those of one whole run."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from children import TINY, Child, Preparation, wait_for, warm_parent
from sample_workers import images_and_sha256

from featcache.cache.reading import open_cache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes by /proc")

COMMAND = ("extract", "data", "c.h5", *TINY, "--batch-size", "2", "--workers", "2")
NUM_CONTENTS = 43
LOST_IMAGES = 9
"""That a death may cost: with batches of two, ``SMALL_SHARDS`` lets no more be run and not listed.
"""
SMALL_SHARDS = ("small_shards", 4, 2)
COPIES = 3  # may be run though another worker, or part, runs their content at the same time

Place = tuple[Path, str]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """46 images, three of them copies; and the sha256 of what one process makes of them."""
    return images_and_sha256(tmp_path_factory.mktemp("images"))


class Extraction:
    """The command, as often as it takes, in a folder with the images."""

    def __init__(self, folder: Path, images: Place) -> None:
        folder.mkdir()
        (folder / "data").symlink_to(images[0])
        self.folder, self._sha256 = folder, images[1]

    def start(
        self, *options: object, seconds: float = 0.02, no_locks: bool = False, quiet: bool = True,
        more: tuple[Preparation, ...] = (),
    ) -> Child:  # fmt: skip
        """Start it; each batch is waited for."""
        before: list[Preparation] = [
            ("set", "featcache.extraction.workers.coordinator", "MIN_IMAGES", 8),
            SMALL_SHARDS,
            ("call", "forked_workers", "prepare", str(self.folder / "forwards"), seconds),
            *more,
        ]  # fmt: skip
        before += [("no_locks", errno.ENOLCK)] * no_locks
        command = (*COMMAND, *["--quiet"] * quiet, *options)
        return warm_parent().start(*command, cwd=self.folder, before=tuple(before))

    def finish(self, *options: object, no_locks: bool = False) -> None:
        """Run it to its end."""
        result = self.start(*options, no_locks=no_locks).wait()
        assert result.code == 0, result

    @property
    def num_spare(self) -> int:
        """How many forward passes were not necessary."""
        return len((self.folder / "forwards").read_text("utf-8").splitlines()) - NUM_CONTENTS

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return len(list((self.folder / "c.h5.partial").glob("shard.*")))

    @property
    def num_pauses(self) -> int:
        """How many batches have been waited for."""
        return (self.folder / "forwards.pauses").stat().st_size

    def rows(self, manifest: str = "manifest.json") -> int:
        """How many rows a manifest lists."""
        file = self.folder / "c.h5.partial" / manifest
        shards = json.loads(file.read_bytes())["shards"] if file.exists() else []
        return sum(shard["num_rows"] for shard in shards)

    def check(self, num_deaths: int) -> int:
        """Check that the cache is whole, and that each death has cost a shard at most."""
        cache = open_cache(self.folder / "c.h5")
        assert cache.failures == ()
        assert cache.content_sha256 == self._sha256
        assert not (self.folder / "c.h5.partial").exists()
        spare = self.num_spare
        assert 0 <= spare <= num_deaths * LOST_IMAGES + COPIES, (num_deaths, spare)
        return spare


@pytest.fixture
def begin(images: Place, tmp_path: Path) -> Callable[[], Extraction]:
    """A new extraction at each call."""
    numbers = iter(range(1000))
    return lambda: Extraction(tmp_path / str(next(numbers)), images)


def tell_spare(tally: Callable[..., None], what: str, spare: list[tuple[int, int]]) -> None:
    """Say how many images were run again, of (images, deaths) of each extraction."""
    worst = max((images / deaths for images, deaths in spare if deaths), default=0.0)
    outcome = f"images, {worst:.1f} a death in the worst extraction"
    tally(f"run again after kills of {what}", outcome, sum(images for images, _ in spare))


def workers_of(child: Child) -> list[int]:
    text = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text("ascii")
    return [int(word) for word in text.split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_killed_at_random_moments(
    begin: Callable[[], Extraction], rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    rng, wanted, total, spare = random.Random(6), rounds(3, 200), 0, list[tuple[int, int]]()
    while total < wanted:
        run, deaths = begin(), 0
        child = run.start("--processes", 3)
        moments = sorted(rng.uniform(0, 1) for _ in range(4))
        for before, moment in zip([0.0, *moments], moments, strict=False):
            wait_for(lambda of=run: of.num_shards > 0, child)
            time.sleep(moment - before)
            if child.is_running() and (victims := workers_of(child)):
                os.kill(rng.choice(victims), signal.SIGKILL)
                deaths += 1
        result = child.wait()
        assert result.code == 0, result
        spare.append((run.check(deaths), deaths))
        total += deaths
        tally("SIGKILL of workers", "ended equal", deaths)
    tell_spare(tally, "workers", spare)


def test_workers_that_are_asked_to_end_lose_nothing(
    begin: Callable[[], Extraction], rounds: Callable[[int, int], int]
) -> None:
    for _ in range(rounds(1, 20)):
        run = begin()
        child = run.start("--processes", 2)
        wait_for(lambda of=run: of.num_shards > 1, child)
        os.kill(workers_of(child)[0], signal.SIGTERM)
        result = child.wait()
        assert result.code == 0, result
        run.check(1)


def test_workers_of_a_coordinator_that_ends_stop_and_it_is_resumed(
    begin: Callable[[], Extraction], rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    rng, spare = random.Random(5), list[tuple[int, int]]()
    for turn in range(rounds(2, 50)):
        run = begin()
        number = signal.SIGTERM if turn % 4 == 1 else signal.SIGKILL
        listed = rng.randint(1, 6)
        child = run.start("--processes", 2)
        wait_for(lambda of=run, n=listed: of.num_shards >= n, child)
        time.sleep(rng.uniform(0, 0.1))
        workers = workers_of(child)
        child.kill(number)
        result = child.wait()
        if number == signal.SIGTERM:
            assert result.code == 143, result
            assert "of 46 images kept in" in result.err
            assert not any(map(is_running, workers))
        wait_for(lambda pids=workers: not any(map(is_running, pids)), None)
        rows = run.rows()
        assert rows or listed <= 2  # a worker may have made one that was not listed yet
        before = run.num_spare + NUM_CONTENTS
        run.finish("--processes", 2)
        assert run.num_spare + NUM_CONTENTS - before <= 46 - rows + COPIES
        spare.append((run.check(2), 2))
        tally(f"{number.name} of coordinators", "ended equal")
    tell_spare(tally, "coordinators", spare)


def test_a_worker_goes_no_further_than_a_shard_without_its_coordinator(
    begin: Callable[[], Extraction],
) -> None:
    """It has one task of all images, and a coordinator that lists nothing any more."""
    run = begin()
    everything = ("set", "featcache.extraction.workers.coordinator", "MIN_IMAGES", 46)
    child = run.start("--processes", 2, more=(everything,))
    wait_for(lambda: run.rows() > 0, child)
    os.kill(child.pid, signal.SIGSTOP)
    before, spare = -NUM_CONTENTS, run.num_spare
    while before < spare:
        time.sleep(0.5)
        before, spare = spare, run.num_spare
    child.kill()
    assert child.wait().code == -signal.SIGKILL
    assert NUM_CONTENTS + spare - run.rows() <= LOST_IMAGES
    run.finish("--processes", 2)
    run.check(1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_waits_as_long_as_batches_take(
    begin: Callable[[], Extraction], processes: int
) -> None:
    """The watchdog would end the command after a fifth of a second: a batch takes half a one."""
    run = begin()
    child = run.start(
        "--processes", processes, seconds=0.5, more=(
            ("set", "featcache.cli.ending", "_HELD_SECONDS", 0.2),
            ("set", "featcache.cli.ending", "_NOTICE_SECONDS", 0.1),
            ("set", "featcache.extraction.work", "_LEAST_PATIENCE", 0.0),
        ),
    )  # fmt: skip
    wait_for(lambda: run.num_shards > 0, child)
    num_pauses = run.num_pauses
    wait_for(lambda: run.num_pauses > num_pauses, child)
    child.kill(signal.SIGTERM)
    result = child.wait()
    assert result.code == 143, result
    waits, says = filter(None, result.err.splitlines())
    assert "finishing the batch in hand, " in waits
    assert "the same signal again ends at once" in waits
    assert "of 46 images kept in" in says
    assert run.rows() >= 4


def test_a_worker_that_hangs_is_said_and_left_alone(begin: Callable[[], Extraction]) -> None:
    run = begin()
    child = run.start(
        "--processes", 2, quiet=False, seconds=0.2,
        more=(("set", "featcache.extraction.workers.places", "SILENT_SECONDS", 1.0),),
    )  # fmt: skip
    wait_for(lambda: run.num_shards > 0, child)
    workers = workers_of(child)
    for worker in workers:  # both: one alone would do all that is left
        os.kill(worker, signal.SIGSTOP)
    said = [f"(process {worker} on " for worker in workers]
    wait_for(lambda: any(text in child.said for text in said), child)
    named = [text in child.said for text in said]
    assert any(named)  # one may have had nothing in hand
    victim, other = workers if named[0] else reversed(workers)
    os.kill(victim, signal.SIGKILL)
    os.kill(other, signal.SIGCONT)
    result = child.wait()
    assert result.code == 0, result
    assert child.said.count(f"(process {victim} on ") == 1
    run.check(1)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_for_slurm_and_a_rerun_of_one_task_after_its_death(
    begin: Callable[[], Extraction],
) -> None:
    """Without SLURM: its variables are set, and srun writes down what it would run."""
    run = begin()
    srun = run.folder / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > srun.told\n', "ascii")
    srun.chmod(0o755)

    def submitted(number: int, count: int) -> list[str]:
        environment = os.environ | {
            "PATH": f"{run.folder}{os.pathsep}{os.environ['PATH']}", "FEATCACHE_PARTS": "3",
            "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": str(count),
        }  # fmt: skip
        script = Path(__file__).parents[3] / "scripts" / "slurm_array.sh"
        subprocess.run(["bash", script, *COMMAND[1:]], env=environment, cwd=run.folder, check=True)
        program, *command = (run.folder / "srun.told").read_text("utf-8").splitlines()
        assert program == "featcache"
        assert command[: len(COMMAND)] == list(COMMAND)
        return command[len(COMMAND) :]

    for number in (1, 3):
        run.finish(*submitted(number, 3))
    child = run.start(*submitted(2, 3))
    wait_for(lambda: run.rows("part.2.json") > 0, child)
    child.kill()
    assert child.wait().code == -signal.SIGKILL
    rows = run.rows("part.2.json")
    before = run.num_spare
    run.finish(*submitted(2, 1))  # sbatch --array=2
    assert run.num_spare - before <= 16 - rows
    assert {run.rows(f"part.{number}.json") for number in (1, 2, 3)} == {15, 16}
    run.finish()
    run.check(1)


def test_parts_and_merges_killed_at_random_moments(
    begin: Callable[[], Extraction], rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    """Three parts at once, one of them with two workers, where no file can be locked."""
    rng, totals, wanted = random.Random(7), {"parts": 0, "merges": 0}, rounds(2, 60)
    spare = list[tuple[int, int]]()
    while totals["parts"] < wanted:
        run, deaths = begin(), 0
        parts = [("--part", "1/3"), ("--part", "2/3"), ("--part", "3/3", "--processes", "2")]
        left = dict(enumerate(parts[rng.randrange(2) :], 1))  # one may never be begun
        at_work: dict[int, Child] = {}
        while left:
            for number in set(left) - set(at_work):
                at_work[number] = run.start(*left[number], no_locks=True)
            time.sleep(rng.uniform(0, 0.4))
            number = rng.choice(sorted(at_work))
            child = at_work.pop(number)
            is_victim = rng.random() < 0.6 and child.is_running()
            if is_victim:
                child.kill()
                deaths += 2 if number == 3 else 1
                totals["parts"] += 1
            result = child.wait()
            if result.code == 0:
                del left[number]
            else:
                assert (is_victim, result.code) == (True, -signal.SIGKILL), result
        rows = sum(run.rows(f"part.{number}.json") for number in (1, 2, 3))
        while rng.random() < 0.7:
            child = run.start(no_locks=True)
            time.sleep(rng.uniform(0, 0.15))
            if child.is_running():
                child.kill()
                deaths, totals["merges"] = deaths + 1, totals["merges"] + 1
            if child.wait().code == 0:
                break
        before = run.num_spare
        run.finish(no_locks=True)
        assert run.num_spare - before <= 46 - rows
        spare.append((run.check(deaths), deaths))
    for kind, number in totals.items():
        tally(f"SIGKILL of {kind}", "ended equal", number)
    tell_spare(tally, "parts", spare)
