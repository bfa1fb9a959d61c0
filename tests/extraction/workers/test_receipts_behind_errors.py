"""What workers have handed in when an error ends the extraction is listed all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
from sample_images import write_tree

from featcache.errors import CacheError
from featcache.extraction import extraction
from featcache.extraction.manifest import read_manifest
from featcache.extraction.plan import Job
from featcache.extraction.shards import write_shard
from featcache.extraction.workers.coordinator import Coordinator, Ended, Event, Failed
from featcache.extraction.workers.worker import Done, Facts, Ready, ShardMade, Task


class Pair:
    """Two workers: as soon as both have a task, one fails and the other hands in a shard."""

    def __init__(self) -> None:
        self.given: list[tuple[Facts, Callable[[Event], object], Task]] = []

    def start(self, number: int, facts: Facts, tell: Callable[[Event], object]) -> Any:
        pair = self

        class Handle:
            def give(self, task: Task) -> None:
                pair.given.append((facts, tell, task))
                if len(pair.given) == 2:
                    pair.end()

            def listed(self) -> None:
                pass

            def stop(self) -> None:
                pass

            def kill(self) -> None:
                pass

        tell(Ready("host", f"device {number}", 1, 16))
        return Handle()

    def end(self) -> None:
        (_, tell_first, _), (facts, tell, task) = self.given
        tell_first(Failed(CacheError("worker", expected="a disk", found="none")))
        tell_first(Ended("exit code 1"))
        rows = [
            {"path": s.path, "image_bytes": s.image_bytes, "mtime_ns": s.mtime_ns,
             "image_sha256": f"{number + 1:064x}", "truncated": False, "views": 1}
            for number, s in enumerate(task.samples)
        ]  # fmt: skip
        path = facts.jobs[0].folder / f"shard.{task.first_shards[0]:05d}"
        receipt = write_shard(path, np.zeros((len(rows), tiny_network.NUM_FEATURES), "<f4"), rows)
        made = tuple(
            (position, bytes.fromhex(str(row["image_sha256"])), False, 1)
            for position, row in zip(task.positions, rows, strict=True)
        )
        tell(ShardMade(task.number, 0, receipt, made))
        tell(Done(task.number, (), len(rows), 1.0, {}))
        tell(Ended("asked to", was_asked=True))


def test_shards_behind_an_error_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()

    def work_on(devices: Sequence[str], jobs: Sequence[Job], positions: Sequence[int]) -> None:
        Coordinator(jobs, positions, pair.start, len(devices)).run()

    monkeypatch.setattr(extraction, "work_on", work_on)
    images = write_tree(tmp_path / "data")
    with pytest.raises(CacheError, match="worker: expected a disk"):
        extraction.extract(
            images, tmp_path / "c.h5", backbone=tiny_network.build(), processes=2, device="cpu"
        )
    (receipt,) = read_manifest(tmp_path / "c.h5.partial" / "manifest.json").shards
    assert receipt.num_rows == len(pair.given[1][2].positions)
