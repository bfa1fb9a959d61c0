"""Rows to train on and to judge by: what belongs together stays together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sample_rows import array_of, edited, make_cache, rows_of

from featcache.cache.reading import Cache
from featcache.heads.rows import choose_rows
from featcache.runtime import log_line
from featcache.sweeps.folds import Pool
from featcache.sweeps.sweeping import sweep


def grouped(path: Path, num_groups: int = 24) -> Cache:
    """Rows whose groups run through ``train`` and ``valid``, and some copies of one image."""
    rows = {}
    for name, number in (("train", 60), ("valid", 24)):
        part = rows_of(name, [0, 1] * (number // 2), width=16)
        groups = [f"g{i % num_groups}" for i in range(number)]
        hashes = part.image_sha256.copy()
        hashes[5] = hashes[11] = 7
        rows[name] = edited(part, groups=groups, image_sha256=hashes)
    return make_cache(path, **rows)


@pytest.mark.filterwarnings("ignore::featcache.errors.FeatcacheWarning")
def test_no_group_or_image_stands_on_both_sides(tmp_path: Path) -> None:
    cache = grouped(tmp_path / "c.h5")
    pool = Pool.of(cache, choose_rows(cache, None, 0, log_line))
    groups = np.array([*cache.split("train").groups, *cache.split("valid").groups])
    images = np.concatenate([cache.split(n).image_sha256 for n in ("train", "valid")])
    keys = np.array([image.tobytes().hex() for image in images])
    seen: set[tuple[int, ...]] = set()
    for seed in range(5):
        folds = pool.make_folds(4, seed)
        judged = np.concatenate([valid for _, valid in folds])
        assert sorted(judged.tolist()) == list(range(84))
        for rows, valid in [*folds, pool.hold_out(seed)]:
            assert sorted([*rows, *valid]) == list(range(84))
            assert set(groups[rows]).isdisjoint(groups[valid])
            assert set(keys[rows]).isdisjoint(keys[valid])
            assert set(pool.targets[valid]) == set(pool.targets[rows]) == {0, 1}
            seen.add(tuple(valid.tolist()))
    assert len(seen) == 25, "another seed, other folds"


def test_rows_with_views_are_judged_as_they_are(tmp_path: Path) -> None:
    part = rows_of("train", [0, 1] * 20)
    views = np.random.default_rng(1).normal(size=(40, 3, 10)).astype("<f4")
    views[:, 0] = array_of(part)
    cache = make_cache(tmp_path / "c.h5", train=edited(part, features=views), valid=[0, 1] * 10)
    pool = Pool.of(cache, choose_rows(cache, None, 0, log_line))
    valid = cache.split("valid").features
    assert np.array_equal(pool.plain, np.concatenate([views[:, 0], valid]))
    assert np.array_equal(pool.features[40:], np.repeat(valid[:, None], 3, axis=1))
    sweep(cache.path, tmp_path / "r", trials=2, repeats=2, device="cpu")
