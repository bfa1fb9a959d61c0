"""A split of an open cache as a map-style data set: rows, workers, pickling, replacement."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from sample_caches import small, snapshot
from sample_containers import (
    same,
)

from featcache.cache.cache_split import CacheSplit
from featcache.cache.reading import open_cache
from featcache.cache.writing import write_cache
from featcache.errors import CacheError

# --- a split as a torch data set


def test_rows_are_the_arrays_rows_in_float32(tmp_path: Path) -> None:
    for dtype in (np.float32, np.float16):
        values = np.random.default_rng(1).normal(size=(5, 2, 3)).astype(dtype)
        for features in (values, values[:, 0]):
            cache = write_cache(
                tmp_path / "c.h5", features, [0, 1, -1, 1, 0], list("abcde"), classes=["x", "y"],
                overwrite=True,
            )  # fmt: skip
            split = cache.split("all")
            assert split.features.dtype == split.read_features().dtype == dtype
            assert same(split.features, features)
            rows = [split[i] for i in range(5)]
            for (row, target), wanted, number in zip(rows, features, [0, 1, -1, 1, 0], strict=True):
                assert row.dtype == torch.float32
                assert np.array_equal(row.numpy(), wanted.astype(np.float32))
                assert target == number
                assert type(target) is int
            order = [3, 0, 3]
            for (row, target), i in zip(split.__getitems__(order), order, strict=True):
                assert torch.equal(row, rows[i][0])
                assert (target, type(target)) == (rows[i][1], int)
            rows[0][0].zero_()  # a caller's row is his own
            assert np.array_equal(split[0][0].numpy(), features[0].astype(np.float32))


def test_a_split_ends_where_it_ends(tmp_path: Path) -> None:
    split = small(tmp_path / "c.h5").split("test")
    assert len(list(split)) == len(split) == 3  # type: ignore[call-overload]
    assert torch.equal(split[-1][0], split[2][0])
    with pytest.raises(IndexError):
        split[3]


def test_several_labels_a_row(tmp_path: Path) -> None:
    targets = np.array([[0, 1, np.nan], [1, 1, 0]], np.float32)
    features = np.ones((2, 4), np.float32)
    cache = write_cache(tmp_path / "c.h5", features, targets, ["b", "a"], classes=["x", "y", "z"])
    assert open_cache(tmp_path / "c.h5").task == cache.task == "multilabel"
    split = cache.split("all")
    assert same(np.ascontiguousarray(split.targets), targets[::-1].copy())
    for rows in ([split[1]], split.__getitems__([1])):
        torch.testing.assert_close(rows[0][1], torch.from_numpy(targets[0]), equal_nan=True)
    split[1][1].zero_()
    assert split.targets[1, 1] == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_rows(tmp_path: Path, method: str) -> None:
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    features = np.random.default_rng(2).normal(size=(37, 6)).astype(np.float16)
    targets = np.arange(37) % 3 - 1
    paths = [f"{i:02d}" for i in range(37)]
    split = write_cache(tmp_path / "c.h5", features, targets, paths, classes=["x", "y"]).split(
        "all"
    )
    assert split.features.shape == (37, 6)  # mapped here before the workers start
    loader = torch.utils.data.DataLoader(
        split,
        batch_size=5,
        num_workers=2 if method == "fork" else 1,
        multiprocessing_context=method,
    )
    batches = list(loader)
    assert np.array_equal(torch.cat([x for x, _ in batches]).numpy(), features.astype(np.float32))
    assert torch.cat([y for _, y in batches]).tolist() == targets.tolist()


def test_a_pickled_split_and_cache_reopen_the_same_file(tmp_path: Path) -> None:
    cache = small(tmp_path / "c.h5")
    split = cache.split("train")
    assert split.features.sum() != 0
    data = pickle.dumps(split)
    assert len(data) < 10_000, "the arrays must not travel"
    again = pickle.loads(data)
    assert isinstance(again, CacheSplit)
    assert same(again.features, split.features)
    assert again.paths == split.paths
    assert snapshot(pickle.loads(pickle.dumps(cache))) == snapshot(cache)


def test_a_copy_refuses_a_file_that_was_replaced(tmp_path: Path) -> None:
    cache = small(tmp_path / "c.h5")
    data = pickle.dumps(cache.split("train"))
    small(tmp_path / "c.h5", classes=["covid", "normaL"])
    with pytest.raises(CacheError, match="replaced while in use: open it again"):
        pickle.loads(data)
    (tmp_path / "c.h5").unlink()
    with pytest.raises(CacheError, match="no such file"):
        pickle.loads(data)


@pytest.mark.parametrize("keep_time", [False, True])
def test_an_open_cache_never_mixes_in_rows_of_a_file_that_replaced_it(
    tmp_path: Path, keep_time: bool
) -> None:
    """Same shapes, same length, as after an update: the targets were mapped, the rest was not."""
    path = tmp_path / "c.h5"
    cache = write_cache(path, np.ones((4, 8), np.float32), [0] * 4, list("abcd"), classes="xy")
    before = path.stat()
    rows = np.full((4, 8), 2, np.float32)
    write_cache(path, rows, [1] * 4, list("efgh"), classes="xy", overwrite=True)
    assert path.stat().st_size == before.st_size
    if keep_time:  # cp -p, rsync -t
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    split = cache.split("all")
    with contextlib.suppress(CacheError):
        assert split.targets.tolist() == [0] * 4
        assert split.features.max() == 1
        assert split.paths == list("abcd")
        assert split.read_features().max() == 1


def test_an_open_cache_survives_its_replacement_where_it_was_read(tmp_path: Path) -> None:
    """Writers rename a new file into place: who has the old one mapped keeps it, whole."""
    cache = small(tmp_path / "c.h5")
    features = cache.split("train").features
    truth = features.copy()
    for i in range(5):
        write_cache(
            tmp_path / "c.h5", np.ones((9, 9), np.float32), [i] * 9, "abcdefghi", classes="abcde",
            overwrite=True,
        )  # fmt: skip
    assert same(features.copy(), truth)


def test_a_moved_cache_is_the_same_cache(tmp_path: Path) -> None:
    cache = small(tmp_path / "c.h5")
    shutil.copy(tmp_path / "c.h5", tmp_path / "copy of it.h5")
    assert snapshot(open_cache(tmp_path / "copy of it.h5")) == snapshot(cache)


def test_a_split_with_views_stands_beside_splits_without(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    views = rng.normal(size=(4, 3, 5)).astype(np.float32)
    plain = rng.normal(size=(2, 5)).astype(np.float32)
    write_cache(
        tmp_path / "c.h5", {"train": views, "valid": plain}, {"train": [0] * 4, "valid": [0] * 2},
        {"train": list("abcd"), "valid": list("ef")}, classes=["x"],
    )  # fmt: skip
    cache = open_cache(tmp_path / "c.h5")
    train, valid = cache.split("train"), cache.split("valid")
    assert cache.num_features == 5
    assert (train.num_views, valid.num_views) == (3, 1)
    assert np.array_equal(train.features, views)
    assert np.array_equal(train.read_features(), views)
    assert np.array_equal(train.plain_features, views[:, 0])
    assert np.array_equal(valid.plain_features, plain)
    assert [item[0].shape for item in (train[1], valid[1])] == [(3, 5), (5,)]
    assert np.array_equal(train.__getitems__([2, 0])[1][0], views[0])
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["splits/train/features"].shape == (4, 3, 5)
        assert file["splits/valid/features"].shape == (2, 5)
