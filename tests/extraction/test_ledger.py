"""The ledger: contents found by their bytes, made once, and every image settled in the end."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from featcache.data.dataset import ImageDataset, Sample, Samples
from featcache.errors import DataError
from featcache.extraction.ledger import Ledger
from featcache.extraction.shards import Vectors
from featcache.extraction.view_stream import Outcome


def sha(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def held(rows: Sequence[float]) -> Vectors:
    """Vectors of three equal features each."""
    array = np.repeat(np.array(rows, np.float32)[:, None], 3, 1)
    reader = SimpleNamespace(shape=array.shape, dtype=array.dtype, take=array.__getitem__)
    return lambda: reader  # type: ignore[return-value]


def images(*splits: str) -> Samples:
    """Return images number 0, 1 ..., of the splits that are given, each of another size."""
    return Samples(
        Sample(f"{split}/{n}.png", 0, split, None, 10 + n, n) for n, split in enumerate(splits)
    )


class Bench:
    """A ledger over some images, of which those to train on have three views."""

    def __init__(self, *splits: str, max_failures: int | float = 1.0) -> None:
        self.samples = images(*splits)
        dataset = ImageDataset(Path(), "splits", ("a",), self.samples)
        views = {"train": 3, "valid": 1, "test": 1}
        self.ledger = Ledger(dataset, views, max_failures)

    def shard(self, rows: Sequence[tuple[int, int, int]], *, truncated: int = -1) -> int:
        """Enter a shard of (position, content, number of views); feature v is content + v / 10."""
        made = [content + view / 10 for _, content, views in rows for view in range(views)]
        table = []
        for position, content, views in rows:
            sample = self.samples[position]
            table.append({
                "path": sample.path, "image_bytes": sample.image_bytes,
                "mtime_ns": sample.mtime_ns, "image_sha256": sha(content).hex(),
                "truncated": content == truncated, "views": views,
            })  # fmt: skip
        return self.ledger.add_shard(held(made), table)

    def settle(
        self, position: int, content: int | None = 0, *, reason: str | None = None,
        is_transient: bool = False, truncated: bool = False,
    ) -> bool:  # fmt: skip
        digest = bytes(32) if content is None else sha(content)
        sample = self.samples[position]
        return self.ledger.settle(
            Outcome(position, sample, digest, reason, truncated, (), is_transient)
        )

    def failed(self) -> list[tuple[str, str]]:
        return [(failure.path, failure.reason) for failure in self.ledger.failures]

    def rows(self, split: str) -> dict[str, Any]:
        """Path -> first feature of each view, of the images of a split that have features."""
        positions, numbers = self.ledger.rows_of(split)
        if not len(positions):
            return {}
        blocks = self.ledger.feature_blocks(numbers, 3 if split == "train" else 1, block_vectors=4)
        features = np.concatenate(list(blocks))[..., 0]
        rows = zip(positions, features, strict=True)
        return {self.samples[position].path: row.tolist() for position, row in rows}


# ------------------------------------------------------------------------------ known from before


def test_unchanged_images_have_their_rows_in_any_order() -> None:
    bench = Bench("valid", "valid", "train", "valid", "train")
    assert bench.shard([(4, 4, 3), (3, 3, 1)], truncated=3) == 2
    assert bench.shard([(2, 2, 3), (0, 0, 1)]) == 2
    assert bench.ledger.match() == []
    assert [bench.ledger.wants(position) for position in range(5)] == [False, True, *[False] * 3]
    assert bench.ledger.num_wanted == 1
    assert bench.ledger.num_kept == 4
    assert bench.rows("valid") == {"valid/0.png": 0, "valid/3.png": 3}
    expected = {"train/2.png": [2, 2.1, 2.2], "train/4.png": [4, 4.1, 4.2]}
    assert bench.rows("train") == {path: pytest.approx(row) for path, row in expected.items()}
    _, numbers = bench.ledger.rows_of("valid")
    assert [bench.ledger.is_truncated(number) for number in numbers] == [False, True]
    assert bench.ledger.sha256_of(numbers).tobytes() == sha(0) + sha(3)


def test_with_rehash_size_and_time_prove_nothing() -> None:
    bench = Bench("valid", "valid")
    bench.shard([(0, 0, 1), (1, 1, 1)])
    assert bench.ledger.match(rehash=True) == [0, 1]
    bench.ledger.recognise(0, sha(1))
    bench.ledger.recognise(1, sha(7))
    assert bench.rows("valid") == {"valid/0.png": 1}
    assert bench.ledger.wants(1)


def test_plain_views_do_not_suffice_to_train_and_of_many_views_the_first_is_plain() -> None:
    """``valid`` has become ``train``, and the other way round."""
    bench = Bench("train", "valid")
    bench.shard([(0, 0, 1), (1, 1, 3)])
    assert bench.ledger.match() == [0]
    bench.ledger.recognise(0, sha(0))
    assert bench.ledger.wants(0)
    assert bench.rows("valid") == {"valid/1.png": 1}
    assert bench.ledger.claim(0, sha(0))
    assert bench.settle(0)
    bench.ledger.store(held([70, 71, 72]), [0])
    assert bench.rows("train") == {"train/0.png": [70, 71, 72]}


def test_a_row_without_vectors_is_known_if_its_content_stands_elsewhere() -> None:
    bench = Bench("valid", "valid", "valid")
    bench.shard([(0, 0, 1)])
    assert bench.shard([(1, 0, 0), (2, 9, 0)]) == 1
    bench.ledger.match()
    assert bench.rows("valid") == {"valid/0.png": 0, "valid/1.png": 0}


def test_an_unknown_hash_is_never_found() -> None:
    """Rows of ``write_cache`` have zeros for a hash: they are no copies of each other."""
    bench = Bench("valid", "valid")
    row = {
        "path": "valid/0.png", "image_bytes": 10, "mtime_ns": 0, "truncated": False, "views": 1,
        "image_sha256": bytes(32).hex(),
    }  # fmt: skip
    bench.ledger.add_shard(held([0]), [row])
    bench.ledger.match()
    bench.ledger.recognise(1, bytes(32))
    assert bench.ledger.wants(1)
    assert bench.rows("valid") == {"valid/0.png": 0}


# ---------------------------------------------------------------------------------------- claims


def test_the_first_image_of_a_content_claims_it_and_may_ask_again() -> None:
    bench = Bench("valid", "valid", "valid")
    assert bench.ledger.claim(1, sha(0))
    assert not bench.ledger.claim(0, sha(0))
    assert bench.ledger.claim(1, sha(0))  # tried again, after a decoder that hung
    assert bench.settle(1, truncated=True)
    assert not bench.ledger.claim(1, sha(0))  # it has come
    assert not bench.ledger.claim(2, sha(0))
    row = bench.ledger.describe_row(1, 1)
    assert row == {
        "path": "valid/1.png", "image_bytes": 11, "mtime_ns": 1, "image_sha256": sha(0).hex(),
        "truncated": True, "views": 1,
    }  # fmt: skip


def test_a_claim_for_more_views_does_not_disturb_the_one_for_fewer() -> None:
    bench = Bench("valid", "train", "test")
    assert bench.ledger.claim(0, sha(0))
    assert bench.ledger.claim(1, sha(0))
    assert not bench.ledger.claim(2, sha(0))
    assert bench.settle(0)
    assert bench.settle(1)
    bench.ledger.store(held([1, 2, 3, 4]), [0, 1])
    assert bench.rows("valid") == {"valid/0.png": 1}
    assert bench.rows("train") == {"train/1.png": [2, 3, 4]}
    assert bench.ledger.num_new == 2


def test_of_many_threads_one_makes_each_content() -> None:
    number = 500
    bench, won = Bench(*["valid"] * 4 * number), list[int]()

    def ask(first: int) -> None:
        won.extend(n for n in range(number) if bench.ledger.claim(first + n, sha(n)))

    threads = [threading.Thread(target=ask, args=(i * number,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(number))


# -------------------------------------------------------------------------- images of one content


def test_a_copy_that_comes_first_waits_for_the_one_that_makes_it() -> None:
    bench = Bench("valid", "valid", "valid")
    assert bench.ledger.claim(2, sha(0))  # threads do not keep the order
    assert not bench.settle(0)
    assert bench.ledger.settle_repeated() == []
    assert bench.ledger.wants(0)
    assert bench.settle(2)
    assert bench.ledger.settle_repeated() == [0]
    assert bench.ledger.settle_repeated() == []
    assert not bench.settle(1)
    assert bench.ledger.settle_repeated() == [1]
    bench.ledger.store(held([5]), [2])
    assert bench.rows("valid") == dict.fromkeys(["valid/0.png", "valid/1.png", "valid/2.png"], 5)
    assert bench.ledger.num_new == 1


def test_a_copy_of_what_failed_fails_for_the_same_reason() -> None:
    bench = Bench("valid", "valid", "valid", "valid")
    assert bench.ledger.claim(1, sha(0))
    bench.settle(0)  # waits
    bench.settle(1, reason="broken")
    assert not bench.ledger.claim(3, sha(0))  # it would fail again
    bench.settle(2)  # comes later
    bench.ledger.settle_repeated()
    assert bench.failed() == [(f"valid/{n}.png", "broken") for n in (1, 0, 2)]


def test_an_accident_of_one_image_is_not_its_copies() -> None:
    bench = Bench("valid", "valid", "valid")
    assert bench.ledger.claim(1, sha(0))
    bench.settle(0)  # waits
    bench.settle(1, reason="no memory", is_transient=True)
    bench.settle(2)  # comes later, and was not claimed either
    assert bench.ledger.settle_repeated() == []
    assert bench.failed() == [("valid/1.png", "no memory")]
    assert bench.ledger.take_unsettled() == [0, 2]
    assert bench.ledger.take_unsettled() == []
    assert bench.ledger.claim(2, sha(0))
    assert not bench.ledger.claim(0, sha(0))
    bench.settle(0)
    bench.settle(2)
    assert bench.ledger.settle_repeated() == [0]
    assert bench.ledger.num_wanted == 0


def test_a_copy_that_was_under_way_meanwhile_takes_the_claim_over() -> None:
    bench = Bench("valid", "valid", "valid")
    assert bench.ledger.claim(1, sha(0))
    bench.settle(0)  # waits for that one
    bench.settle(1, reason="no memory", is_transient=True)
    assert bench.ledger.claim(2, sha(0))
    bench.settle(2)
    assert bench.ledger.settle_repeated() == [0]
    assert bench.ledger.take_unsettled() == []


def test_an_image_that_changed_between_two_readings_fails() -> None:
    bench = Bench("valid", "valid")
    assert bench.ledger.claim(0, sha(0))
    assert bench.ledger.claim(0, sha(1))  # read again after its decoder hung
    bench.settle(1)  # of the bytes that are gone, and good
    assert not bench.settle(0, 1)
    bench.ledger.settle_repeated()
    assert bench.failed() == [("valid/0.png", "it changed while it was read")]
    assert bench.ledger.take_unsettled() == [1]


def test_a_thread_that_comes_back_late_keeps_no_copy_waiting() -> None:
    """It hung while it read an image that has failed meanwhile, or that waits for another's."""
    bench = Bench("valid", "valid", "valid")
    bench.settle(0, None, reason="no such file")
    assert not bench.ledger.claim(0, sha(0))
    assert bench.ledger.claim(1, sha(0))
    bench.settle(2)
    bench.settle(1, reason="no memory", is_transient=True)
    assert bench.ledger.claim(2, sha(0))  # by a thread nobody waits for
    assert bench.ledger.settle_repeated() == []
    assert bench.ledger.take_unsettled() == [2]
    assert bench.ledger.claim(2, sha(0))
    assert bench.settle(2)


# -------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("allowed", "limit", "number"),
    [(0, "0", 0), (2, "2", 2), (0.05, "5%", 1), (0.0, "0%", 0), (0.5, "50%", 3)],
)
def test_failures_are_counted_per_split_and_class(
    allowed: int | float, limit: str, number: int
) -> None:
    """Of six images; a share allows one at least."""
    bench = Bench(*["valid"] * 6, "test", max_failures=allowed)
    for position in range(number):
        bench.settle(position, None, reason="broken")
    expected = rf"at most {limit} of 6 failed in valid/a, found {number + 1}, the last being"
    with pytest.raises(DataError, match=expected):
        bench.settle(number, None, reason="broken")
    assert len(bench.failed()) == number + 1
