"""A cache in the making: only what is listed, whole and of this recipe counts as done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from featcache.dataset import Sample
from featcache.errors import CacheError
from featcache.shards import EngineFacts, KnownRows, PartialCache, image_key

FINGERPRINT = "a" * 64
ENGINE = EngineFacts("eager", "fp32", 4, 2, "cpu")


def sample(number: int) -> Sample:
    return Sample(f"train/covid/{number:03d}.png", 0, "train", None, 100 + number, 5_000 + number)


def facts(number: int) -> dict[str, object]:
    one = sample(number)
    return {
        "path": one.path, "image_bytes": one.image_bytes, "mtime_ns": one.mtime_ns,
        "image_sha256": bytes([number]).hex() * 32, "truncated": number % 2 == 1,
        "views": 1,
    }  # fmt: skip


def new_partial(folder: Path, fingerprint: str = FINGERPRINT) -> PartialCache:
    return PartialCache(folder, fingerprint, 3, np.dtype("<f4"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A partial cache of two shards: rows 0 to 3 and 4 to 5."""
    (tmp_path / "c.h5.partial").mkdir()
    partial = new_partial(tmp_path / "c.h5.partial")
    partial.start(ENGINE, {"precision": "fp32"})
    known = KnownRows()
    for numbers in (range(4), range(4, 6)):
        rows = np.array([[n, n, n] for n in numbers], np.float32)
        partial.add_shard(rows, [facts(n) for n in numbers], known)
    return tmp_path / "c.h5.partial"


def test_a_resumed_run_knows_every_listed_row(folder: Path) -> None:
    partial, known = new_partial(folder), KnownRows()
    assert partial.resume(known) == 6
    assert partial.engine == ENGINE
    assert partial.provenance == {"precision": "fp32"}
    assert partial.was_killed  # nobody called stop()
    rows = [known.find(sample(n)) for n in (5, 0, 4, 3)]
    assert all(row is not None for row in rows)
    gathered = np.concatenate(list(known.blocks([r for r in rows if r], block_vectors=3)))
    np.testing.assert_array_equal(gathered[:, 0], [5, 0, 4, 3])
    assert rows[0] is not None
    assert rows[0].sha256 == bytes([5]) * 32
    assert rows[0].truncated


@pytest.fixture
def mixed(folder: Path) -> KnownRows:
    """Rows 0 to 5 of one vector [n, n, n], rows 6 and 8 of three views, row 7 of one, resumed."""
    partial, known = new_partial(folder), KnownRows()
    partial.resume(known)
    views = {6: 3, 7: 1, 8: 3}
    vectors = [[n + view / 10] * 3 for n, count in views.items() for view in range(count)]
    rows = [facts(n) | {"views": count} for n, count in views.items()]
    partial.add_shard(np.array(vectors, np.float32), rows, known)
    again = KnownRows()
    assert new_partial(folder).resume(again) == 9
    return again


def test_rows_of_several_views_and_of_one_share_a_shard(mixed: KnownRows) -> None:
    rows = [mixed.find(sample(n), 3) for n in (8, 6)]
    gathered = np.concatenate(list(mixed.blocks([r for r in rows if r], 3, block_vectors=4)))
    expected = [[8, 8.1, 8.2], [6, 6.1, 6.2]]
    np.testing.assert_array_equal(gathered, np.repeat(np.float32(expected)[..., None], 3, 2))


def test_a_row_of_too_few_views_is_not_known(mixed: KnownRows) -> None:
    """``valid`` has become ``train``."""
    assert [mixed.find(sample(n), 3) is not None for n in (0, 6, 7, 8)] == [
        False,
        True,
        False,
        True,
    ]
    assert mixed.find(sample(6), 4) is None


def test_of_more_views_than_wanted_the_first_are_taken(mixed: KnownRows) -> None:
    """``train`` has become ``valid``."""
    rows = [mixed.find(sample(n)) for n in (8, 0, 7, 6)]
    gathered = np.concatenate(list(mixed.blocks([r for r in rows if r])))
    np.testing.assert_array_equal(gathered, np.repeat([[8.0], [0], [7], [6]], 3, 1))
    pairs = [r for r in (rows[0], rows[3]) if r]
    np.testing.assert_array_equal(
        next(mixed.blocks(pairs, 2))[..., 0], np.float32([[8, 8.1], [6, 6.1]])
    )


def test_an_image_extracted_again_has_its_new_views(mixed: KnownRows) -> None:
    key = image_key(sample(7))
    mixed.add(np.full((3, 3), 70, np.float32), [3], [key], [bytes(32)], [False])
    row = mixed.find(sample(7), 3)
    assert row is not None
    np.testing.assert_array_equal(next(mixed.blocks([row], 3)), np.full((1, 3, 3), 70))


def test_a_changed_image_is_not_known(folder: Path) -> None:
    known = KnownRows()
    new_partial(folder).resume(known)
    path, size, time = image_key(sample(2))
    for changed in ((path, size + 1, time), (path, size, time + 1), (path + "x", size, time)):
        assert known.find(Sample(changed[0], 0, "train", None, *changed[1:])) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_extracted_again(folder: Path, damage: str) -> None:
    shard = folder / "shard.00000"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[7] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[:-1])
    else:
        shard.unlink()
    known = KnownRows()
    assert new_partial(folder).resume(known) == 2
    assert known.find(sample(0)) is None
    assert known.find(sample(4)) is not None


def test_a_shard_nobody_listed_does_not_count(folder: Path) -> None:
    (folder / "shard.00002").write_bytes(bytes(12))
    partial, known = new_partial(folder), KnownRows()
    assert partial.resume(known) == 6
    partial.add_shard(np.full((1, 3), 9, np.float32), [facts(9)], known)
    again = KnownRows()
    assert new_partial(folder).resume(again) == 7
    row = again.find(sample(9))
    assert row is not None
    np.testing.assert_array_equal(next(again.blocks([row])), [[9, 9, 9]])


def test_rows_of_another_recipe_never_mix_in(folder: Path) -> None:
    with pytest.raises(CacheError, match=r"made with other settings.*--rebuild"):
        new_partial(folder, "b" * 64).resume(KnownRows())


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "featcache-partial"}'])
def test_an_unreadable_manifest_is_said(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CacheError, match="readable manifest"):
        new_partial(folder).resume(KnownRows())


def test_stop_and_clear(folder: Path) -> None:
    partial = new_partial(folder)
    partial.resume(KnownRows())
    partial.stop()
    stopped = new_partial(folder)
    stopped.resume(KnownRows())
    assert not stopped.was_killed
    stopped.clear()
    assert new_partial(folder).resume(KnownRows()) == 0
    assert list(folder.glob("shard.*")) == []
