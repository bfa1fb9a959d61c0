"""A cache in the making: only what is listed, whole and of this recipe counts as done."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing import failing

from featcache.errors import CacheError
from featcache.extraction import partial_cache, shards
from featcache.extraction.manifest import EngineFacts
from featcache.extraction.partial_cache import PartialCache
from featcache.extraction.shards import Vectors, write_shard
from featcache.files import canonical_json

FINGERPRINT = "a" * 64
ENGINE = EngineFacts("eager", "fp32", 4, 2, "cpu")


def facts(number: int, views: int = 1) -> dict[str, Any]:
    return {
        "path": f"train/covid/{number:03d}.png", "image_bytes": 100 + number,
        "mtime_ns": 5_000 + number, "image_sha256": bytes([number]).hex() * 32,
        "truncated": number % 2 == 1, "views": views,
    }  # fmt: skip


def vectors(number: int, views: int = 1) -> np.ndarray:
    return np.array([[number + view / 10] * 3 for view in range(views)], np.float32)


def new_partial(folder: Path, fingerprint: str = FINGERPRINT) -> PartialCache:
    return PartialCache(folder, fingerprint, 3, np.dtype("<f4"))


def add(partial: PartialCache, features: list[np.ndarray], rows: list[dict[str, Any]]) -> Vectors:
    """Write a shard and list it."""
    stacked = np.concatenate([np.empty((0, 3), np.float32), *features])
    return partial.add_shard(write_shard(partial.next_shard, stacked, rows))


def read_all(open_vectors: Vectors) -> np.ndarray:
    reader = open_vectors()
    return reader.take(np.arange(reader.shape[0]))


def reopen(folder: Path) -> tuple[PartialCache, dict[str, np.ndarray]]:
    """Open what is there and return its rows by path."""
    partial, rows = new_partial(folder), {}
    assert partial.open()
    for open_vectors, table in partial.read_shards():
        shard, start = read_all(open_vectors), 0
        for row in table:
            rows[row["path"]] = np.array(shard[start : start + row["views"]])
            start += row["views"]
        assert start == len(shard)
    return partial, rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A partial cache of two shards: rows 0 to 3 and 4 to 5, row 4 of three views, 5 of none."""
    (tmp_path / "c.h5.partial").mkdir()
    partial = new_partial(tmp_path / "c.h5.partial")
    assert not partial.open()
    partial.start(ENGINE, {"precision": "fp32"})
    add(partial, [vectors(n) for n in range(4)], [facts(n) for n in range(4)])
    made = add(partial, [vectors(4, 3)], [facts(4, 3), facts(5, 0)])
    np.testing.assert_array_equal(read_all(made), vectors(4, 3))
    return tmp_path / "c.h5.partial"


def test_a_resumed_run_knows_every_listed_row(folder: Path) -> None:
    partial, rows = reopen(folder)
    assert partial.engine == ENGINE
    assert partial.provenance == {"precision": "fp32"}
    assert partial.was_killed  # nobody called stop()
    assert list(rows) == [facts(n)["path"] for n in range(6)]
    for number, views in enumerate((1, 1, 1, 1, 3, 0)):
        np.testing.assert_array_equal(
            rows[facts(number)["path"]], vectors(number, views).reshape(views, 3)
        )


def test_a_shard_of_known_contents_alone_has_no_vectors(folder: Path) -> None:
    partial, _ = reopen(folder)
    assert add(partial, [], [facts(7, 0), facts(8, 0)])().shape == (0, 3)
    _, rows = reopen(folder)
    assert rows[facts(8)["path"]].shape == (0, 3)


def test_the_table_comes_back_as_it_was(folder: Path) -> None:
    partial = new_partial(folder)
    partial.open()
    tables = [table for _, table in partial.read_shards()]
    assert tables == [[facts(n) for n in range(4)], [facts(4, 3), facts(5, 0)]]


@pytest.mark.parametrize("damage", ["flip", "flip the table", "cut", "remove"])
def test_a_damaged_shard_is_extracted_again(folder: Path, damage: str) -> None:
    shard = folder / "shard.00000"
    data = bytearray(shard.read_bytes())
    if damage.startswith("flip"):
        data[7 if damage == "flip" else -7] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[:-1])
    else:
        shard.unlink()
    partial, rows = reopen(folder)
    assert list(rows) == [facts(n)["path"] for n in (4, 5)]
    add(partial, [vectors(9)], [facts(9)])  # and the damaged one is off the list
    assert len(json.loads((folder / "manifest.json").read_bytes())["shards"]) == 2


class UnreadableFile(io.FileIO):
    """A file on a disk that fails."""

    read = failing(OSError(errno.EIO, os.strerror(errno.EIO)))


@pytest.mark.parametrize("call", ["open", "read", "read again"])
def test_a_shard_that_cannot_be_read_now_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """An error of the disk may pass: what was extracted is not thrown away for it."""
    partial = new_partial(folder)
    partial.open()
    with monkeypatch.context() as patches:
        if call == "open":
            error = OSError(errno.EIO, os.strerror(errno.EIO))
            patches.setattr(shards, "open_regular", failing(error))
        else:
            patches.setattr(shards, "open_regular", UnreadableFile)
        if call == "read again":  # of the table, once the checksum was found right
            patches.setattr(partial_cache, "is_whole", lambda *_: True)
        with pytest.raises(CacheError, match=r"Input/output error .*shard\.00000"):
            list(partial.read_shards())
    partial.abandon()
    assert len(reopen(folder)[1]) == 6


def test_a_shard_nobody_listed_does_not_count(folder: Path) -> None:
    (folder / "shard.00002").write_bytes(bytes(12))
    partial, rows = reopen(folder)
    assert len(rows) == 6
    add(partial, [vectors(9)], [facts(9)])
    _, rows = reopen(folder)
    np.testing.assert_array_equal(rows[facts(9)["path"]], [[9, 9, 9]])


def test_rows_of_another_recipe_never_mix_in(folder: Path) -> None:
    with pytest.raises(CacheError, match=r"made with other settings.*--rebuild"):
        new_partial(folder, "b" * 64).open()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "featcache-partial"}'])
def test_an_unreadable_manifest_is_said(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CacheError, match="readable manifest"):
        new_partial(folder).open()


@pytest.mark.parametrize(
    "change", [('batch_size":4', 'batch_size":5'), ("shard.00001", "shard.00000")]
)
def test_a_manifest_that_was_changed_is_not_believed(folder: Path, change: tuple[str, str]) -> None:
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    assert change[0] in text
    manifest.write_text(text.replace(*change))
    with pytest.raises(CacheError, match="sha256 is another"):
        new_partial(folder).open()


@pytest.mark.parametrize("name", ["../secret", "shard.1/../../x", "lock"])
def test_a_manifest_names_shards_of_its_folder_only(folder: Path, name: str) -> None:
    partial = new_partial(folder)
    partial.open()
    written = write_shard(partial.next_shard, vectors(9), [facts(9)])
    partial.add_shard(replace(written, file="shard.1"))
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text.replace('"shard.1"', json.dumps(name)))
    del manifest["sha256"]
    signed = manifest | {"sha256": hashlib.sha256(canonical_json(manifest).encode()).hexdigest()}
    (folder / "manifest.json").write_text(canonical_json(signed))
    with pytest.raises(CacheError, match="readable manifest"):
        new_partial(folder).open()


def test_the_manifest_does_not_grow_with_the_rows(folder: Path) -> None:
    partial, _ = reopen(folder)
    before = (folder / "manifest.json").stat().st_size
    rows = [facts(n % 256) for n in range(2_000)]
    add(partial, [vectors(n) for n in range(2_000)], rows)
    assert (folder / "manifest.json").stat().st_size < before + 200


def test_stop_and_clear(folder: Path) -> None:
    partial, _ = reopen(folder)
    partial.stop()
    stopped, _ = reopen(folder)
    assert not stopped.was_killed
    stopped.clear()
    assert not new_partial(folder).open()
    assert list(folder.glob("shard.*")) == []
