"""Repair: damaged rows are dropped and extracted again, nothing is made up, nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_network
from children_here import run_here
from failing import failing
from sample_caches import TINY, rewrite
from sample_images import write_image, write_tree

from featcache import outputs
from featcache.backbones.backbone import Backbone
from featcache.cache import repair
from featcache.cache.reading import Cache, open_cache
from featcache.cache.selection import select
from featcache.cache.writing import partial_folder, write_cache
from featcache.errors import CacheError, FeatcacheWarning
from featcache.evaluation.info import info
from featcache.extraction import comparison
from featcache.extraction.extraction import extract
from featcache.extraction.verification import verify
from featcache.heads.training import train

GOLDEN = Path(__file__).parents[1] / "data" / "format_v1.h5"
SIZES = {"train": 5, "valid": 2, "test": 2}


@pytest.fixture(autouse=True)
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each verification would start one, for half a second."""
    run_here(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Path:
    """A folder with images and a good cache of them."""
    folder = tmp_path_factory.mktemp("made")
    write_tree(folder / "data", SIZES)
    extract(folder / "data", folder / "c.h5", backbone=tiny_backbone)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, times and all."""
    return shutil.copytree(made, tmp_path / "x")


def flip(path: Path, name: str, *places: int) -> Cache:
    """Flip a bit of some bytes of a data set; return the cache as it was."""
    cache, raw = open_cache(path), bytearray(path.read_bytes())
    cache.splits["train"].paths  # noqa: B018 (read while the file is the one that was opened)
    for place in places:
        raw[cache.container.arrays[name].offset + place] ^= 2
    path.write_bytes(raw)
    return cache


def content(cache: Cache) -> list[tuple[str, str, bytes]]:
    """Every array of the splits, the very bytes."""
    names = [name for name in cache.container.arrays if name.startswith("splits/")]
    arrays = {name: np.array(cache.container.map(name)) for name in names}
    return [(name, a.dtype.str, a.tobytes()) for name, a in sorted(arrays.items())]


COLUMNS = ["features", "targets", "paths", "image_sha256", "image_bytes", "mtime_ns", "row_crc32"]


@pytest.mark.parametrize("column", COLUMNS)
def test_damaged_rows_are_dropped_and_the_next_extraction_fills_the_gap(
    folder: Path, tiny_backbone: Backbone, column: str
) -> None:
    path = folder / "c.h5"
    wanted = content(open_cache(path))
    size = open_cache(path).container.arrays[f"splits/train/{column}"].num_bytes // 10
    flip(path, f"splits/train/{column}", 3 * size, 7 * size)
    result = verify(path, repair=True)
    assert (result.repaired, result.num_rows, len(result.dropped)) == (True, 16, 2)
    assert verify(path).num_rows == 16
    assert not partial_folder(path).exists()
    failures = info(path).as_dict()["failures"]
    assert [f["split"] for f in failures] == ["train", "train"]
    assert all(f["reason"].startswith("row dropped by featcache verify") for f in failures)
    summary = extract(folder / "data", path, backbone=tiny_backbone)
    assert (summary.num_new, summary.num_failed) == (2, 0)
    assert content(open_cache(path)) == wanted


def test_training_reports_rows_that_a_repair_dropped(folder: Path, tmp_path: Path) -> None:
    flip(folder / "c.h5", "splits/train/features", 0)
    said: list[str] = []
    verify(folder / "c.h5", repair=True, say=said.append)
    assert said == ["dropped: row 0 of train, train/covid/trc000_0.jpg: found others"]
    summary = train(folder / "c.h5", tmp_path / "run", epochs=1, hidden=())
    assert summary.num_failed == 1


PARTS = ["provenance", "failures/paths", "failures/splits", "failures/reasons", "failures/targets"]


@pytest.mark.parametrize("part", PARTS)
def test_damage_outside_the_rows_costs_no_row(folder: Path, part: str) -> None:
    path = folder / "c.h5"
    (folder / "data" / "train" / "covid" / "zz.png").write_bytes(b"no image")
    with pytest.warns(FeatcacheWarning, match="1 image could not be read"):
        extract(folder / "data", path, backbone=tiny_network.build(), max_errors=1)
    wanted = content(open_cache(path))
    flip(path, part, 0)
    with pytest.raises(CacheError, match=f"^cache, {part}: .*--repair"):
        verify(path)
    result = verify(path, repair=True)
    assert (result.repaired, result.dropped) == (True, ())
    again = open_cache(path)
    assert content(again) == wanted
    assert len(again.failures) == (part == "provenance")  # tried again by the next extraction
    assert ("lost" in again.provenance) == (part == "provenance")
    verify(path)


def test_a_precision_that_was_lost_is_never_made_up(
    folder: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    """Rows made at bf16 are not taken for untrue ones of fp32 without a word, nor for true ones."""
    path = folder / "c.h5"
    path.unlink()
    extract(folder / "data", path, backbone=tiny_backbone, precision="bf16")
    flip(path, "provenance", 0)
    verify(path, repair=True)
    unknown = "expected features within 1e-04, as at fp32, since nobody knows their precision"
    with pytest.raises(CacheError, match=unknown):
        verify(path, data=folder / "data", samples="all", backbone=TINY, device="cpu")
    write_image(folder / "data" / "train" / "covid" / "zz.png", 999, bright=True)
    with pytest.warns(FeatcacheWarning, match="nobody knows how its rows were made"):
        assert extract(folder / "data", path, backbone=tiny_backbone).num_new == 1
    with pytest.raises(CacheError, match=unknown):
        verify(path, data=folder / "data", samples="all", backbone=TINY, device="cpu")
    select([path], tmp_path / "new.h5")
    assert "lost" in open_cache(tmp_path / "new.h5").provenance


def test_images_that_cannot_be_read_are_no_trouble_with_writing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = PermissionError(13, "Permission denied", "data/x.png")
    monkeypatch.setattr(comparison, "compare", failing(error))
    with pytest.raises(PermissionError, match=r"data/x\.png"):
        verify(folder / "c.h5", repair=True, data=folder / "data")


def test_a_repaired_file_that_cannot_be_put_in_place_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "c.h5"
    flip(path, "splits/train/features", 5)
    before = path.read_bytes()

    def exchange(*_: object) -> bool:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(outputs, "exchange", exchange)
    with pytest.raises(CacheError, match=r"^writing: expected a writable folder, found Read-only"):
        verify(path, repair=True)
    assert path.read_bytes() == before
    assert not partial_folder(path).exists()


def test_damaged_hdf5_metadata_is_made_again(folder: Path) -> None:
    path = folder / "c.h5"
    raw = path.read_bytes()
    (folder / "c.h5").write_bytes(raw[:4096] + b"\0" * 8 + raw[4104:])  # HDF5's signature
    with pytest.raises(CacheError, match=r"^cache, HDF5 metadata: .*--repair"):
        verify(path)
    assert verify(path, repair=True).dropped == ()
    assert path.read_bytes() == raw, "equal arrays, equal file"


def test_a_good_cache_is_left_alone(folder: Path) -> None:
    before, said = (folder / "c.h5").stat(), list[str]()
    result = verify(folder / "c.h5", repair=True, say=said.append)
    assert (result.repaired, result.dropped, said) == (False, (), ["nothing to repair"])
    after = (folder / "c.h5").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert not partial_folder(folder / "c.h5").exists()


@pytest.mark.parametrize("part", ["identity", "classes", "task"])
def test_damage_that_takes_the_meaning_of_all_rows_asks_for_a_rebuild(
    folder: Path, part: str
) -> None:
    flip(folder / "c.h5", part, 0)
    before = (folder / "c.h5").read_bytes()
    with pytest.raises(CacheError, match=f"^cache, {part}: .*--rebuild"):
        verify(folder / "c.h5")
    with pytest.raises(CacheError, match=f"found damage in {part}.*--rebuild"):
        verify(folder / "c.h5", repair=True)
    assert (folder / "c.h5").read_bytes() == before
    assert not partial_folder(folder / "c.h5").exists()


def test_damage_that_cannot_be_repaired_asks_for_a_rebuild(folder: Path) -> None:
    path = folder / "c.h5"
    raw = path.read_bytes()

    def refused(data: bytes, match: str) -> None:
        path.write_bytes(data)
        with pytest.raises(CacheError, match=match):
            verify(path, repair=True)
        assert path.read_bytes() == data
        assert not partial_folder(path).exists()

    refused(raw[:100] + b"~" + raw[101:], "user block.*--rebuild")
    refused(raw[: len(raw) // 2], "length.*--rebuild")
    refused(b"", "an empty file")
    old = bytearray(GOLDEN.read_bytes())
    old[open_cache(GOLDEN).container.arrays["splits/train/features"].offset] ^= 1
    refused(bytes(old), "checksums of the rows.*--rebuild")
    data = bytearray(raw)
    for name, entry in open_cache_of(raw, path).container.arrays.items():
        if name.endswith("/features"):
            data[entry.offset : entry.offset + entry.num_bytes] = b"\1" * entry.num_bytes
    refused(bytes(data), "none of 18.*--rebuild")


def open_cache_of(raw: bytes, path: Path) -> Cache:
    path.write_bytes(raw)
    return open_cache(path)


def test_rows_that_are_not_finite_are_dropped_from_an_old_cache_too(tmp_path: Path) -> None:
    cache = write_cache(
        tmp_path / "c.h5", np.ones((4, 3), np.float32), [0, 1, 0, 1], list("abcd"),
        classes=["p", "q"],
    )  # fmt: skip
    features = np.array(cache.splits["all"].features)
    features[2, 1] = np.inf
    rewrite(cache, {"all": features})
    assert verify(tmp_path / "c.h5", repair=True).dropped == ("c",)
    assert open_cache(tmp_path / "c.h5").splits["all"].paths == ["a", "b", "d"]


def test_a_class_or_a_split_may_end_up_empty_and_is_filled(
    folder: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    path = folder / "c.h5"
    wanted = content(open_cache(path))
    flip(path, "splits/valid/targets", 0, 8, 16, 24)
    assert len(verify(path, repair=True).dropped) == 4
    assert len(open_cache(path).splits["valid"]) == 0
    verify(path)
    with pytest.raises(CacheError, match="split valid: expected labelled rows, found none"):
        train(path, tmp_path / "run")
    extract(folder / "data", path, backbone=tiny_backbone)
    assert content(open_cache(path)) == wanted


def test_views_groups_and_half_precision_survive(tmp_path: Path, tiny_backbone: Backbone) -> None:
    write_tree(tmp_path / "data", SIZES)
    how = {"views": 2, "augment": "flip", "feature_dtype": "float16", "group_by": r"^(\w+)_"}
    extract(tmp_path / "data", tmp_path / "c.h5", backbone=tiny_backbone, **how)
    wanted = content(open_cache(tmp_path / "c.h5"))
    flip(tmp_path / "c.h5", "splits/train/groups", 0)
    assert len(verify(tmp_path / "c.h5", repair=True).dropped) == 1
    assert open_cache(tmp_path / "c.h5").splits["train"].features.shape == (9, 2, 24)
    extract(tmp_path / "data", tmp_path / "c.h5", backbone=tiny_backbone, **how)
    assert content(open_cache(tmp_path / "c.h5")) == wanted


def test_wrong_and_outdated_rows_are_dropped_when_the_images_are_given(
    folder: Path, tiny_backbone: Backbone
) -> None:
    path, data = folder / "c.h5", folder / "data"
    cache = open_cache(path)
    wanted = content(cache)
    features = np.array(cache.splits["test"].features)
    features[1] *= 1.001
    untrue, stale = cache.splits["test"].paths[1], cache.splits["valid"].paths[0]
    rewrite(cache, {"test": features})
    kept = (data / stale).read_bytes()
    write_image(data / stale, 1234)
    result = verify(path, data=data, samples="all", backbone=TINY, repair=True)
    assert (result.dropped, result.changed) == ((stale, untrue), (stale,))
    assert (result.num_rows, result.num_compared) == (16, 17)
    assert verify(path, data=data, samples="all", backbone=TINY).appeared == (stale,)
    (data / stale).write_bytes(kept)
    extract(data, path, backbone=tiny_backbone, max_errors=0)
    names = {name for name, _, _ in wanted} - {"splits/valid/mtime_ns", "splits/valid/row_crc32"}
    mended = {name: (kind, raw) for name, kind, raw in content(open_cache(path))}
    assert {n: mended[n] for n in names} == {n: (k, r) for n, k, r in wanted if n in names}
    assert verify(path, data=data, samples="all", backbone=TINY).num_compared == 18


def test_damaged_and_wrong_rows_are_repaired_in_one_go(folder: Path) -> None:
    path, data = folder / "c.h5", folder / "data"
    cache = open_cache(path)
    features = np.array(cache.splits["test"].features)
    features[1] *= 1.001
    untrue = cache.splits["test"].paths[1]
    damaged = cache.splits["train"].paths[0]
    rewrite(cache, {"test": features})
    flip(path, "splits/train/features", 1)
    result = verify(path, data=data, samples="all", backbone=TINY, repair=True)
    assert result.dropped == (damaged, untrue)
    assert [f.path for f in open_cache(path).failures] == [damaged, untrue]


def test_a_repair_that_fails_leaves_the_old_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is looked at before it is published: here the disk damages it."""
    path = folder / "c.h5"
    flip(path, "splits/train/features", 5)
    before = path.read_bytes()
    real: Callable[..., Cache] = repair.write_rows

    def damaging(*args: object, **options: object) -> Cache:
        cache = real(*args, **options)
        flip(cache.path, "splits/test/features", 9)
        return open_cache(cache.path, verify=False)

    monkeypatch.setattr(repair, "write_rows", damaging)
    with pytest.raises(CacheError, match="row 0 of test"):
        verify(path, repair=True)
    assert path.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["c.h5", "data"]


def test_a_writer_at_work_is_not_disturbed(folder: Path) -> None:
    path = folder / "c.h5"
    flip(path, "splits/train/features", 5)
    before = path.read_bytes()
    partial_folder(path).mkdir()
    with (partial_folder(path) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CacheError, match="no other writer"):
            verify(path, repair=True)
    assert path.read_bytes() == before


def test_an_unfinished_update_beside_it_stays(folder: Path) -> None:
    path = folder / "c.h5"
    partial_folder(path).mkdir()
    (partial_folder(path) / "manifest.json").write_text(json.dumps({"any": 1}))
    (partial_folder(path) / "lock").write_text("process 1 on this since then")
    flip(path, "splits/train/features", 5)
    assert verify(path, repair=True).repaired
    assert sorted(p.name for p in partial_folder(path).iterdir()) == ["lock", "manifest.json"]
