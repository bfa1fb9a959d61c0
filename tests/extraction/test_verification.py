"""Verify: a damaged or untrue cache is named with its first bad row; a good one passes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
from children_here import run_here
from PIL import Image
from sample_caches import TINY, rewrite
from sample_containers import edit_block, entry_of
from sample_images import write_image

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache, open_cache
from featcache.cache.writing import write_cache
from featcache.errors import BackboneError, CacheError, ConfigError, DataError
from featcache.evaluation.info import info
from featcache.extraction.extraction import extract
from featcache.extraction.verification import verify


@pytest.fixture(autouse=True)
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """libhdf5 reads every cache in one: half a second, and its own tests are elsewhere."""
    run_here(monkeypatch)


@pytest.fixture
def cache(cache_of_tree: Path) -> Cache:
    return open_cache(cache_of_tree)


def test_a_good_cache_is_whole_and_true(cache: Cache, tree: Path, tiny_backbone: Backbone) -> None:
    result = verify(cache.path)
    assert (result.num_rows, result.num_compared, result.largest_error) == (46, 0, None)
    result = verify(cache.path, data=tree, backbone=tiny_backbone, samples="all")
    assert result.num_compared == 46
    assert result.largest_error is not None
    assert result.bound is not None
    assert 0 <= result.largest_error < result.bound
    assert verify(cache.path, data=tree, samples=7, backbone=TINY).num_compared == 7


def test_one_flipped_bit_is_found(cache: Cache) -> None:
    data, wrong = bytearray(cache.path.read_bytes()), cache.splits["valid"].paths[0]
    offset = cache.container.arrays["splits/valid/features"].offset
    data[offset + 13] ^= 4
    cache.path.write_bytes(data)
    with pytest.raises(CacheError, match="payload sha256"):
        open_cache(cache.path)
    with pytest.raises(
        CacheError, match=f"^row 0 of valid, {wrong}: .*checksum, found others .*--repair"
    ):
        verify(cache.path)


def test_a_row_that_is_not_true_is_named(cache: Cache, tree: Path) -> None:
    features = np.array(cache.splits["test"].features)
    features[3] *= 1.001
    rewrite(cache, {"test": features})
    verify(cache.path)  # it is whole
    wrong = cache.splits["test"].paths[3]
    with pytest.raises(CacheError, match=f"^row 3 of test, {wrong}: .*error of 1.0e-03 .*--repair"):
        verify(cache.path, data=tree, samples="all", backbone=TINY)


def test_an_hdf5_view_that_differs_from_the_table_is_found(cache: Cache) -> None:
    def unlist(block: dict[str, Any]) -> None:  # h5py still finds it
        block["arrays"].remove(entry_of(block, "splits/train/row_crc32"))

    edit_block(cache.path, unlist)
    with pytest.raises(CacheError, match="HDF5 view of the cache"):
        verify(cache.path)


def test_features_that_are_not_finite_are_named(cache: Cache) -> None:
    features = np.array(cache.splits["train"].features)
    features[5, 2] = np.nan
    rewrite(cache, {"train": features})
    with pytest.raises(CacheError, match=f"row 5 of train, {cache.splits['train'].paths[5]}: "):
        verify(cache.path)


def test_changed_vanished_and_new_images_are_said(cache: Cache, tree: Path) -> None:
    paths = cache.splits["valid"].paths
    write_image(tree / paths[0], 1234)
    (tree / paths[1]).unlink()
    write_image(tree / "valid" / "covid" / "zz.png", 4321)
    said: list[str] = []
    with pytest.raises(CacheError, match=f"row 0 of valid, {paths[0]}: .*the image it was made of"):
        verify(cache.path, data=tree, samples="all", backbone=TINY, say=said.append)
    wanted = {f"changed: {paths[0]}", f"vanished: {paths[1]}", "appeared: valid/covid/zz.png"}
    assert wanted <= set(said)
    assert said[-1].startswith("44 rows recomputed")
    write_image(tree / paths[0], 25, bright=True)
    result = verify(cache.path, data=tree, samples="all", backbone=TINY)
    assert (result.changed, result.vanished) == ((), (paths[1],))
    assert (result.appeared, result.num_compared) == (("valid/covid/zz.png",), 45)


def test_another_image_of_the_same_size_is_found(cache: Cache, tree: Path) -> None:
    path = tree / cache.splits["test"].paths[0]
    size = path.stat().st_size
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))  # decoders stop at the image's end
    with pytest.raises(CacheError, match="the image it was made of, found another one"):
        verify(cache.path, data=tree, samples="all", backbone=TINY)


def test_a_copy_with_other_times_is_true(cache: Cache, tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "copy", copy_function=shutil.copy)
    result = verify(cache.path, data=tmp_path / "copy", samples="all", backbone=TINY)
    assert (result.num_compared, result.changed) == (46, ())


def test_samples_and_backbone_are_checked(
    cache: Cache, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--samples"):
        verify(cache.path, data=tree, samples=0, backbone=TINY)
    other = tiny_network.network()
    other.conv.weight.data *= 1.5
    monkeypatch.setattr(tiny_network, "network", lambda: other)
    with pytest.raises(BackboneError, match=cache.identity["weights_sha256"]):
        verify(cache.path, data=tree, backbone=TINY)


def test_foreign_features_can_be_whole_but_not_compared(tmp_path: Path, tree: Path) -> None:
    features = np.ones((2, 3), np.float32)
    write_cache(tmp_path / "x.h5", features, np.array([0, 1]), ["a", "b"], classes=["p", "q"])
    assert verify(tmp_path / "x.h5").num_rows == 2
    with pytest.raises(DataError, match="features made elsewhere"):
        verify(tmp_path / "x.h5", data=tree)


def test_describe_tells_what_a_cache_holds(cache: Cache) -> None:
    facts = info(cache.path).as_dict()
    assert facts["kind"] == "cache"
    assert facts["identity"]["image_size"] == tiny_network.IMAGE_SIZE
    assert facts["splits"]["train"]["num_per_class"] == {"covid": 12, "normal": 12}
    assert facts["splits"]["train"]["num_groups"] is None
    assert facts["verified"] is False
    with pytest.raises(CacheError):
        info(cache.path.parent / "nothing.h5")


def test_other_images_are_not_good(cache: Cache, tmp_path: Path) -> None:
    other = tmp_path / "other" / "covid"
    write_image(other / "a.png", 3)
    with pytest.raises(CacheError, match="none of 46 with the same name"):
        verify(cache.path, data=tmp_path / "other", backbone=TINY)


def test_a_stranger_s_python_backbone_is_not_called_unasked(cache: Cache, tree: Path) -> None:
    with pytest.raises(BackboneError, match="your word that its code may run"):
        verify(cache.path, data=tree)
    with pytest.raises(BackboneError, match="Name the same one"):
        verify(cache.path, data=tree, backbone="python:other:build")


def test_all_views_are_recomputed(tree: Path, tmp_path: Path, tiny_backbone: Backbone) -> None:
    extract(tree, tmp_path / "v.h5", backbone=tiny_backbone, views=3, augment="xray")
    cache = open_cache(tmp_path / "v.h5")
    assert verify(cache.path, data=tree, samples="all", backbone=TINY).num_compared == 46
    facts = info(cache.path).as_dict()
    assert facts["splits"]["train"]["features"] == [24, 3, 24, "float32"]
    assert [split["num_views"] for split in facts["splits"].values()] == [3, 1, 1]
    features = np.array(cache.splits["train"].features)
    features[7, 2] *= 1.001
    rewrite(cache, {"train": features})
    wrong = cache.splits["train"].paths[7]
    with pytest.raises(CacheError, match=f"row 7 of train, {wrong}: .*1.0e-03 in view 2 "):
        verify(cache.path, data=tree, samples="all", backbone=TINY)
    rewrite(cache, {"train": features[:, :2]})
    with pytest.raises(CacheError, match="expected 3 views, found 2"):
        verify(cache.path, data=tree, samples="all", backbone=TINY)
    features[5, 1, 3] = np.nan
    rewrite(cache, {"train": features})
    with pytest.raises(CacheError, match=f"row 5 of train, {cache.splits['train'].paths[5]}: "):
        verify(cache.path)
