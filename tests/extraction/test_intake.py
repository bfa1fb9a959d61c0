"""What the pipeline made on its way into shards: the cases that a real run seldom meets."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from featcache.data.dataset import ImageDataset, Sample
from featcache.errors import BackboneError
from featcache.extraction.intake import Intake
from featcache.extraction.inventory import Inventory
from featcache.extraction.pipeline import Outcome
from featcache.extraction.shards import EngineFacts, PartialCache
from featcache.runtime import Timer

SAMPLES = tuple(Sample(f"train/a/{n}.png", 0, "train", None, 10, n) for n in range(4))
SHA = hashlib.sha256(b"one").digest()
OTHER = hashlib.sha256(b"two").digest()


class Bench:
    """An intake over four samples, and what has failed."""

    def __init__(self, folder: Path, dtype: str = "<f4") -> None:
        dataset = ImageDataset(folder, "splits", ("a",), SAMPLES)
        self.inventory = Inventory(dataset, lambda split: 1)
        self.partial = PartialCache(folder, "f" * 64, 3, np.dtype(dtype))
        self.partial.start(EngineFacts("eager", "fp32", 1, 1, "cpu"), {})
        self.failed: list[tuple[str, str]] = []
        self.intake = Intake(
            self.partial, self.inventory, np.dtype(dtype),
            lambda sample, reason: self.failed.append((sample.path, reason)),
        )  # fmt: skip

    def take(
        self, number: int, sha256: bytes = SHA, *, reason: str | None = None, value: float = 1,
        is_transient: bool = False,
    ) -> None:  # fmt: skip
        sample = SAMPLES[number]
        claimed = self.inventory.contents.claimed_by(sample.path) is not None
        features = np.full((1, 3), value, np.float32) if claimed and reason is None else None
        outcome = Outcome(sample, sha256, reason, truncated=False, is_transient=is_transient)
        self.intake.take(number, outcome, features, claimed=claimed)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "c.h5.partial").mkdir()
    return Bench(tmp_path / "c.h5.partial")


def test_a_copy_that_comes_first_waits_for_the_one_that_makes_it(bench: Bench) -> None:
    assert bench.inventory.claim(SAMPLES[2], SHA)  # threads do not keep the order
    assert not bench.inventory.claim(SAMPLES[0], SHA)
    bench.take(0)
    bench.intake.flush(Timer())
    assert bench.inventory.is_pending(0)
    bench.take(2)
    bench.intake.flush(Timer())
    assert not bench.inventory.is_pending(0)
    assert not bench.inventory.is_pending(2)
    assert bench.intake.num_new == 1
    (shard,) = bench.partial.read_shards()
    assert [row["views"] for row in shard[1]] == [1, 0]


def test_a_copy_of_what_failed_fails_for_the_same_reason(bench: Bench) -> None:
    assert bench.inventory.claim(SAMPLES[1], SHA)
    bench.take(0)  # waits
    bench.take(1, reason="broken")
    bench.take(2)  # comes later
    assert bench.failed == [(SAMPLES[n].path, "broken") for n in (1, 0, 2)]


def test_an_accident_of_one_image_is_not_its_copies(bench: Bench) -> None:
    assert bench.inventory.claim(SAMPLES[1], SHA)
    assert not bench.inventory.claim(SAMPLES[0], SHA)
    bench.take(0)  # waits
    bench.take(1, reason="no memory", is_transient=True)
    bench.take(2)  # comes later, and was not claimed either
    assert bench.failed == [(SAMPLES[1].path, "no memory")]
    assert sorted(bench.intake.pop_unsettled()) == [0, 2]
    assert bench.intake.pop_unsettled() == []
    assert bench.inventory.claim(SAMPLES[2], SHA)
    bench.take(2)
    bench.take(0)
    bench.intake.flush(Timer())
    assert [bench.inventory.is_pending(n) for n in range(3)] == [False, True, False]
    assert bench.failed == [(SAMPLES[1].path, "no memory")]
    assert bench.intake.num_new == 1


def test_a_copy_that_was_under_way_meanwhile_takes_the_claim_over(bench: Bench) -> None:
    assert bench.inventory.claim(SAMPLES[1], SHA)
    bench.take(1, reason="no memory", is_transient=True)
    assert bench.inventory.claim(SAMPLES[2], SHA)
    bench.take(0)  # waits for that one
    bench.take(2)
    bench.intake.flush(Timer())
    assert bench.intake.pop_unsettled() == []
    assert not bench.inventory.is_pending(0)


def test_an_image_that_changed_between_two_readings_fails(bench: Bench) -> None:
    assert bench.inventory.claim(SAMPLES[0], SHA)
    assert bench.inventory.claim(SAMPLES[0], OTHER)  # read again after its decoder hung
    bench.take(1)  # of the bytes that are gone, and good
    bench.take(0, OTHER)
    assert bench.intake.pop_unsettled() == [1]
    assert bench.failed == [(SAMPLES[0].path, "it changed while it was read")]
    bench.intake.flush(Timer())
    assert bench.inventory.is_pending(0)


def test_a_copy_of_what_never_came_is_failed_at_the_end(bench: Bench) -> None:
    assert bench.inventory.claim(SAMPLES[3], SHA)  # by a thread that hangs
    bench.take(0)
    bench.intake.close()
    assert [path for path, _ in bench.failed] == [SAMPLES[0].path]


def test_an_image_that_could_not_be_read_fails(bench: Bench) -> None:
    bench.take(0, bytes(32), reason="no such file")
    assert bench.failed == [(SAMPLES[0].path, "no such file")]


def test_what_is_not_finite_in_the_stored_dtype_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.h5.partial").mkdir()
    bench = Bench(tmp_path / "c.h5.partial", "<f2")
    assert bench.inventory.claim(SAMPLES[0], SHA)
    with pytest.raises(BackboneError, match=r"finite float16 values.*train/a/0\.png"):
        bench.take(0, value=1e6)
