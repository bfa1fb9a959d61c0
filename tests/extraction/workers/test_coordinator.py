"""The coordinator: any number of workers, dying as they like, make the caches of one process."""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_network
from sample_images import write_tree
from sample_workers import Death, use_threads

from featcache.backbones.backbone import Backbone, wrap_backbone
from featcache.cache.reading import Cache, open_cache
from featcache.cli.wording import facts_lines
from featcache.errors import BackboneError, CacheError, DataError, FeatcacheWarning
from featcache.evaluation.info import info
from featcache.extraction import pipeline, work
from featcache.extraction.extraction import extract
from featcache.extraction.workers import coordinator, worker
from featcache.extraction.workers.coordinator import CRASHED
from featcache.extraction.workers.pieces import DEATHS_ALONE
from featcache.extraction.workers.worker import Facts, Progress, ShardMade, Task
from featcache.runtime import Interrupted

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*could not be read:featcache.FeatcacheWarning"),
]

OPTIONS: dict[str, Any] = {"batch_size": 2, "max_errors": 9, "engine": "folded"}
NUM_BAD = 2


def second_backbone() -> Backbone:
    return wrap_backbone("python:second:build", tiny_network.network(), image_size=48)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """46 images: 6 copies of others, also across splits and classes, and 2 bad ones."""
    root = write_tree(tmp_path_factory.mktemp("images") / "data")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for source, target in ((0, 45), (1, 2), (1, 40), (1, 30), (20, 21), (44, 10)):
        shutil.copy(files[source], files[target])
    files[25].write_bytes(b"bad")
    files[33].write_bytes(files[34].read_bytes()[:200])
    return root


@pytest.fixture(scope="module")
def wholes(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """What one process makes of them, by each of two backbones."""
    folder = tmp_path_factory.mktemp("whole")
    options = OPTIONS | {"views": 3, "augment": "crop"}
    made = []
    for number, backbone in enumerate([tiny_network.build(), second_backbone()]):
        with pytest.warns(FeatcacheWarning, match="2 images could not be read"):
            extract(images, folder / f"{number}.h5", backbone=backbone, **options)
        made.append(open_cache(folder / f"{number}.h5"))
    return made


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four images at least, in shards of four rows of the plain view."""
    monkeypatch.setattr(coordinator, "MIN_IMAGES", 4)
    monkeypatch.setattr(work, "SHARD_BYTES", tiny_network.shard_bytes(4, 2))


def run(images: Path, cache: Path, processes: int = 2, **change: Any) -> Any:
    options = OPTIONS | {"backbone": tiny_network.build(), "processes": processes} | change
    return extract(images, cache, **options)


@pytest.mark.parametrize("number", [2, 7])
def test_any_number_of_workers_makes_the_caches_of_one_process(
    images: Path, wholes: list[Cache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    who = Counter[int]()
    use_threads(monkeypatch, lambda number, task, message: who.update([number]))
    backbones = [tiny_network.build(), second_backbone()]
    made = run(images, tmp_path / "many", number, backbone=backbones, views=3, augment="crop")
    assert len(who) == number
    for summary, whole in zip(made.values(), wholes, strict=True):
        assert summary.content_sha256 == whole.content_sha256
        cache = open_cache(summary.cache)
        assert cache.failures == whole.failures
        workers = cache.provenance["workers"]
        assert sum(line["images"] for line in workers) >= 46
        assert {line["device"] for line in workers} == {"cpu"}
        assert summary.num_new + summary.num_known == 46 - NUM_BAD
        told = [line for line in facts_lines(info(summary.cache).as_dict()) if "worker:" in line]
        processes = f"{number} process" if number == 1 else f"{number} processes"
        assert [line.split(", ")[1].split(": ")[1] for line in told] == [processes]
    assert sorted(path.suffix for path in (tmp_path / "many").iterdir()) == [".h5", ".h5"]
    again = run(images, tmp_path / "many", number, backbone=backbones, views=3, augment="crop")
    assert {summary.num_new for summary in again.values()} == {0}


def test_workers_decode_by_the_kernels_that_all_their_tasks_are_worth(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No task of a worker may be large enough alone."""
    asked = list[int]()
    monkeypatch.setattr(worker.acceleration, "start_for", asked.append)
    use_threads(monkeypatch)
    run(images, tmp_path / "c.h5", 2)
    assert sum(path.stat().st_size for path in images.rglob("*.*g")) // 2 in asked


def test_the_start_of_workers_is_not_counted_in_the_rate(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [0.0]

    def pass_time(more: float, result: Any = None) -> Any:
        seconds[0] += more
        return result

    clock = SimpleNamespace(perf_counter=lambda: seconds[0], monotonic=time.monotonic)
    monkeypatch.setattr(coordinator, "time", clock)
    use_threads(monkeypatch, lambda *_: pass_time(0.01), lambda _, facts: pass_time(1e6, facts))
    summary = run(images, tmp_path / "c.h5", 2)
    assert summary.images_per_second is not None
    assert summary.images_per_second > 1


class Dying:
    """A hook that kills workers at random, six times at most."""

    def __init__(self, seed: int) -> None:
        self.num_deaths, self._rng, self._lock = 0, random.Random(seed), threading.Lock()

    def __call__(self, number: int, task: Task, message: object) -> None:
        with self._lock:
            if self._rng.random() < 0.1 and self.num_deaths < 6:
                self.num_deaths += 1
                raise Death


def test_workers_that_die_at_random_lose_a_shard_at_most(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: Any, tally: Any
) -> None:
    options = OPTIONS | {"batch_size": 1}
    monkeypatch.setattr(work, "SHARD_BYTES", tiny_network.shard_bytes(3, 1))
    whole = extract(images, tmp_path / "whole.h5", backbone=tiny_network.build(), **options)
    num_run = list[int]()
    inner = pipeline._forward_chunk

    def counting(run: Any, outcomes: Any, views: Any, clock: Any) -> Any:
        num_run.append(sum(of_image is not None for of_image in views))
        return inner(run, outcomes, views, clock)

    monkeypatch.setattr(pipeline, "_forward_chunk", counting)
    for seed in range(rounds(4, 200)):
        dying = Dying(seed)
        use_threads(monkeypatch, dying)
        num_run.clear()
        summary = run(images, tmp_path / f"{seed}.h5", 3, batch_size=1, say=lambda line: None)
        assert summary.content_sha256 == whole.content_sha256
        spare = sum(num_run) - summary.num_new
        tally("deaths of workers", "a shard lost at most", dying.num_deaths)
        # A shard of three and two batches of one; contents run at the same time.
        assert spare <= dying.num_deaths * 5 + 6, (seed, dying.num_deaths, spare)


def test_images_that_kill_every_worker_are_listed_failures(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.*g"))
    fatal = {files[5], files[6], files[38]}
    given = Counter[str]()

    def die(number: int, task: Task, message: object) -> None:
        if message is None and fatal & (paths := {sample.path for sample in task.samples}):
            given.update(paths)
            raise Death

    use_threads(monkeypatch, die)
    said = list[str]()
    summary = run(images, tmp_path / "c.h5", say=said.append)
    cache = open_cache(tmp_path / "c.h5")
    reasons = {failure.path: failure.reason for failure in cache.failures}
    assert {path for path, reason in reasons.items() if reason == CRASHED} == fatal
    assert len(reasons) == len(fatal) + NUM_BAD
    assert any("has ended: killed by SIGKILL. Another one does the" in line for line in said)
    assert summary.num_images == 46 - len(reasons)
    assert max(given.values()) <= 7 + DEATHS_ALONE  # twice whole, then halved, then alone
    others = tmp_path / "others"
    shutil.copytree(images, others)
    for path in fatal:
        (others / path).unlink()
    monkeypatch.undo()
    well = extract(others, tmp_path / "well.h5", backbone=tiny_network.build(), **OPTIONS)
    for name, split in open_cache(well.cache).splits.items():
        assert split.paths == cache.splits[name].paths
        assert (split.features == cache.splits[name].features).all()


def test_an_image_is_not_blamed_for_as_many_deaths_of_which_one_was_not_of_it_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is killed with one image left of its task, and the next ones with that image."""
    deaths, handed_in = list[int](), set[int]()

    def die(number: int, task: Task, message: object) -> None:
        if isinstance(message, ShardMade) and len(task.samples) == 4:
            handed_in.add(task.number)
        is_first = not deaths and isinstance(message, Progress) and task.number in handed_in
        is_next = 1 <= len(deaths) < DEATHS_ALONE and message is None and task.isolate
        if is_first or is_next:
            deaths.append(len(task.samples))
            raise Death

    use_threads(monkeypatch, die)
    # Of a task of four, one image is left.
    monkeypatch.setattr(work, "SHARD_BYTES", tiny_network.shard_bytes(3, 1))
    run(images, tmp_path / "c.h5", batch_size=1)
    assert deaths == [4, *[1] * (DEATHS_ALONE - 1)]
    reasons = {failure.reason for failure in open_cache(tmp_path / "c.h5").failures}
    assert CRASHED not in reasons
    assert len(open_cache(tmp_path / "c.h5").failures) == NUM_BAD


def test_an_image_that_crashes_decoders_costs_one_worker(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given out again, a task is decoded in a child process."""
    isolated = list[bool]()

    def die(number: int, task: Task, message: object) -> None:
        if message is None and any(sample.path.endswith("trc002_1.png") for sample in task.samples):
            isolated.append(task.isolate)
            if not task.isolate:
                raise Death

    use_threads(monkeypatch, die)
    assert run(images, tmp_path / "c.h5").num_failed == NUM_BAD
    assert isolated == [False, True]


def test_workers_that_always_die_end_with_one_error(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(number: int, task: Task, message: object) -> None:
        raise Death

    use_threads(monkeypatch, die)
    # Before a task is down to one image, which would be blamed.
    monkeypatch.setattr(coordinator, "_MOST_DEATHS", 3)
    with pytest.raises(
        CacheError, match=r"expected a worker that gets an image done, found 3 in a row .*SIGKILL"
    ):
        run(images, tmp_path / "c.h5")
    assert list(tmp_path.iterdir()) == []

    def never_ready(*_: object) -> Facts:
        raise Death

    use_threads(monkeypatch, facts_of=never_ready)
    with pytest.raises(Death):
        run(images, tmp_path / "c.h5")


def with_other_weights(facts: Facts) -> Facts:
    """Return the facts of a worker whose device computes something else."""
    network = tiny_network.network()
    network.widen.weight.data += 0.02
    backbone = replace(facts.jobs[0].recipe.backbone, network=network)
    job = replace(facts.jobs[0], recipe=replace(facts.jobs[0].recipe, backbone=backbone))
    return replace(facts, jobs=(job,))


@pytest.mark.filterwarnings("ignore:engine folded at fp32 is off:featcache.FeatcacheWarning")
def test_a_worker_of_other_features_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(
        monkeypatch, facts_of=lambda number, facts: with_other_weights(facts) if number else facts
    )
    with pytest.warns(FeatcacheWarning, match=r"Worker 2 is left out: worker for c.h5: expected"):
        summary = run(images, tmp_path / "c.h5")
    monkeypatch.undo()
    whole = extract(images, tmp_path / "w.h5", backbone=tiny_network.build(), **OPTIONS)
    assert summary.content_sha256 == whole.content_sha256
    use_threads(monkeypatch, facts_of=lambda _, facts: with_other_weights(facts))
    warnings.simplefilter("ignore", FeatcacheWarning)
    with pytest.raises(BackboneError, match=r"worker for d.h5: expected features within .*off by"):
        run(images, tmp_path / "d.h5")


def test_an_error_of_one_worker_keeps_what_the_others_have(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_threads(monkeypatch)
    with pytest.raises(DataError, match=r"at most 0 of .* failed"):
        run(images, tmp_path / "c.h5", max_errors=0)
    manifest = json.loads((tmp_path / "c.h5.partial" / "manifest.json").read_bytes())
    assert not manifest["running"]
    assert manifest["num_reserved"] >= 100
    assert len(manifest["probes"]["pixels_sha256"]) == 4
    monkeypatch.undo()
    rows = sum(shard["num_rows"] for shard in manifest["shards"])
    resumed = extract(images, tmp_path / "c.h5", backbone=tiny_network.build(), **OPTIONS)
    assert resumed.num_known >= rows > 0
    whole = extract(images, tmp_path / "w.h5", backbone=tiny_network.build(), **OPTIONS)
    assert resumed.content_sha256 == whole.content_sha256


def test_a_signal_lets_workers_hand_back_what_they_have(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = list[int]()

    def stop(number: int, task: Task, message: object) -> None:
        if isinstance(message, ShardMade):
            listed.append(len(message.rows))
            if len(listed) == 3:
                signal.raise_signal(signal.SIGTERM)

    use_threads(monkeypatch, stop)
    with pytest.raises(
        Interrupted, match=r"interrupted: \d+ of 46 images kept .*goes on"
    ) as caught:
        run(images, tmp_path / "c.h5")
    assert caught.value.signal_number == signal.SIGTERM
    use_threads(monkeypatch)
    resumed = run(images, tmp_path / "c.h5")
    assert resumed.num_known >= sum(listed[:3])
    whole = extract(images, tmp_path / "w.h5", backbone=tiny_network.build(), **OPTIONS)
    assert resumed.content_sha256 == whole.content_sha256


def test_a_resumed_run_gives_no_name_of_a_shard_out_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of a coordinator that was killed may still be writing one."""
    numbers = list[set[int]]()

    def note(number: int, task: Task, message: object) -> None:
        numbers[-1].update(range(task.first_shards[0], task.first_shards[0] + task.num_shards))

    use_threads(monkeypatch, note)
    for limit in ({"max_errors": 0}, {}):
        numbers.append(set())
        try:
            run(images, tmp_path / "c.h5", **limit)
        except DataError:
            assert limit
    assert numbers[0]
    assert numbers[1]
    assert not numbers[0] & numbers[1]
