"""Parts of an extraction beside other commands, other parts, failures that pass, and damage."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
from sample_images import write_tree

import featcache
from featcache import heartbeat
from featcache.cache.reading import open_cache
from featcache.cache.writing import cache_lock
from featcache.errors import CacheError, DataError, FeatcacheError
from featcache.extraction import extraction
from featcache.extraction.extraction import extract
from featcache.extraction.workers import parts, plans
from featcache.files import canonical_json, json_sha256

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*could not be read:featcache.FeatcacheWarning"),
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "data")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "c.h5"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are taken for dead, and plans for damaged, within half a second."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(plans, "PATIENCE_SECONDS", 0.1)


def run(images: Path, cache: Path, part: str | None = None, **change: Any) -> Any:
    options = {"batch_size": 2, "engine": "folded", "backbone": tiny_network.build()} | change
    return extract(images, cache, part=part, **options)


def spoil(images: Path, *places: int) -> dict[Path, bytes]:
    """Make images unreadable for a while, of the same size and time; return what they were."""
    files = sorted(path for path in images.glob("train/*/*") if path.is_file())
    before = {files[place]: files[place].read_bytes() for place in places}
    for path in before:
        replace(path, bytes(path.stat().st_size))
    return before


def replace(path: Path, data: bytes) -> None:
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_other_writers_of_the_cache_leave_its_parts_alone(images: Path, cache: Path) -> None:
    run(images, cache, "1/2")
    rows = {"features": np.zeros((4, 3), "f4"), "targets": [0, 1, 0, 1], "paths": list("abcd")}
    with pytest.raises(CacheError, match="found an unfinished extraction of that name"):
        featcache.write_cache(cache, classes=["a", "b"], identity={"name": "x"}, **rows)
    assert (cache.with_name("c.h5.partial") / "part.1.json").exists()


@pytest.mark.parametrize("has_plan", [True, False])
def test_a_part_at_work_is_not_discarded(images: Path, cache: Path, has_plan: bool) -> None:
    """Whoever discards refuses, also while it has not published its plan yet."""
    partial = cache.with_name("c.h5.partial")
    run(images, cache, "1/2")
    if not has_plan:
        for name in ("plan.json", "part.1.json"):
            (partial / name).unlink()
    rows = {"features": np.zeros((4, 3), "f4"), "targets": [0, 1, 0, 1], "paths": list("abcd")}
    made = featcache.write_cache(
        cache.with_name("o.h5"), classes=["a", "b"], identity={"name": "x"}, **rows
    )
    with heartbeat.alive(partial / "alive.2", "part", lambda line: None):
        before = sorted(path.name for path in partial.iterdir())
        for discard in (
            lambda: run(images, cache, rebuild=True),
            lambda: featcache.select(made.path, cache, rebuild=True),
            lambda: featcache.write_cache(
                cache, classes=["a", "b"], identity={"name": "x"}, overwrite=True, **rows
            ),
        ):
            with pytest.raises(CacheError, match=r"part 2 of c.h5: expected no other process at"):
                discard()
        assert sorted(path.name for path in partial.iterdir()) == before
    assert run(images, cache, rebuild=True).num_images == 46


def test_a_part_leaves_a_whole_run_alone(images: Path, cache: Path) -> None:
    """Also one that has nothing in its manifest yet."""
    with (
        cache_lock(cache),
        pytest.raises(CacheError, match=r"^cache c.h5: expected no other writer"),
    ):
        run(images, cache, "1/2")
    assert run(images, cache, "1/2").num_new > 0


def test_a_part_whose_plan_lost_the_race_leaves_nothing_behind(
    images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parts.publish_plan

    def publish_after_another(folder: Path, plan: plans.Plan) -> bool:
        engine = dataclasses.replace(plan.engine, batch_size=7)
        real(folder, dataclasses.replace(plan, num_parts=3, engine=engine))
        return real(folder, plan)

    monkeypatch.setattr(parts, "publish_plan", publish_after_another)
    with pytest.raises(CacheError, match="Use I/3, or finish it without --part"):
        run(images, cache, "2/2")
    monkeypatch.undo()
    assert not (cache.with_name("c.h5.partial") / "part.2.json").exists()
    run(images, cache, "2/3", batch_size=7)
    assert run(images, cache, batch_size=7).num_images == 46


def test_an_image_that_failed_for_a_while_ends_as_a_row_alone(
    images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = spoil(images, 1)
    assert run(images, cache, "1/2").num_failed == 1
    for path, data in before.items():
        replace(path, data)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(extraction, "finish_part", die)  # its shard is listed by then
    with pytest.raises(KeyboardInterrupt):
        run(images, cache, "1/2")
    monkeypatch.undo()
    assert run(images, cache).num_images == 46
    assert open_cache(cache).failures == ()


def test_too_many_failures_of_all_parts_are_tried_anew_by_running_them_again(
    images: Path, cache: Path
) -> None:
    before = spoil(images, 0, 11)  # of one split and class, in two parts
    for number in range(1, 5):
        run(images, cache, f"{number}/4", max_errors=1)
    for path, data in before.items():
        replace(path, data)
    with pytest.raises(DataError, match="Run the parts that have such failures again"):
        run(images, cache, max_errors=1)
    for number in range(1, 5):
        run(images, cache, f"{number}/4", max_errors=1)
    assert run(images, cache, max_errors=1).num_images == 46


def test_a_damaged_plan_is_discarded_by_rebuild(images: Path, cache: Path) -> None:
    run(images, cache, "1/2")
    plan = cache.with_name("c.h5.partial") / "plan.json"
    plan.write_bytes(plan.read_bytes()[:50])
    with pytest.raises(FeatcacheError, match="plan"):
        run(images, cache)
    assert run(images, cache, rebuild=True).num_images == 46


def test_the_merge_is_careful_after_a_part_that_was_killed(
    images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(images, cache, "1/2")
    file = cache.with_name("c.h5.partial") / "part.1.json"
    facts = json.loads(file.read_bytes()) | {"running": True}
    facts["part"].pop("is_done")
    file.write_bytes(
        canonical_json(facts | {"sha256": json_sha256(facts, without="sha256")}).encode()
    )
    seen: list[bool] = []
    real = extraction.work
    monkeypatch.setattr(
        extraction, "work",
        lambda jobs, positions: [seen.append(jobs[0].partial.was_killed), real(jobs, positions)],
    )  # fmt: skip
    run(images, cache)
    assert seen == [True]
