"""Select --fractions: the split that ``split`` makes of the images, without the images."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_images import write_image
from sample_selections import IDENTITY, refused, write_table

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache, Failure, open_cache
from featcache.cache.selection import select
from featcache.cache.writing import write_cache
from featcache.data.splitting import split
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheWarning
from featcache.extraction.extraction import extract

HALVES = (0.5, 0.25, 0.25)


def write_patients(root: Path) -> Path:
    """Write images of 20 patients, some in both classes and some with copies, as CLASS/pN/I.png."""
    for n in range(60):
        patient = f"p{n % 20}"
        write_image(root / ("covid" if n % 3 else "normal") / patient / f"{n}_a.png", n)
    shutil.copy(root / "covid/p1/1_a.png", root / "covid/p2/copy_a.png")
    shutil.copy(root / "covid/p4/4_a.png", root / "normal/p9/copy_a.png")
    return root


def placed(cache: Cache) -> dict[str, tuple[str, str | None]]:
    """Return path -> split and group."""
    return {
        path: (name, rows.groups[i] if rows.groups else None)
        for name, rows in cache.splits.items()
        for i, path in enumerate(rows.paths)
    }


def splits_of_groups(cache: Cache) -> dict[str | None, set[str]]:
    found = defaultdict(set)
    for name, group in placed(cache).values():
        found[group].add(name)
    return found


@pytest.mark.filterwarnings("ignore:.*(copies in another class|same bytes)")
@pytest.mark.parametrize("options", [{}, {"group_by_path": r"^(p\d+)/"}, {"group_by": r"^(\d)"}])
def test_it_is_the_split_of_the_images(
    tmp_path: Path, tiny_backbone: Backbone, options: dict[str, Any]
) -> None:
    """Two ways: split the images to a CSV and select by that table; or select by fractions."""
    raw = write_patients(tmp_path / "raw")
    extract(raw, tmp_path / "raw.h5", backbone=tiny_backbone)
    split(raw, tmp_path / "tree", seed=9)
    extract(tmp_path / "tree", tmp_path / "tree.h5", backbone=tiny_backbone)
    found = []
    for seed in (0, 1):
        table = tmp_path / f"{seed}.csv"
        split(raw, table, fractions=HALVES, seed=seed, **options)
        for name in ("raw", "tree"):
            ways = [
                select(tmp_path / f"{name}.h5", tmp_path / f"{name}{seed}{way}.h5", **more)
                for way, more in (
                    ("a", {"table": table}),
                    ("b", {"fractions": HALVES, "seed": seed, **options}),
                )
            ]
            by_table, by_fractions = (placed(open_cache(way.cache)) for way in ways)
            assert {p: s for p, (s, _) in by_fractions.items()} == {
                p: s for p, (s, _) in by_table.items()
            }
            if name == "raw":
                assert by_fractions == by_table
                assert ways[0].content_sha256 == ways[1].content_sha256
        found.append(by_fractions)
    assert found[0] != found[1]


def test_groups_of_the_cache_stay_unless_others_are_named(make: Any, whole: Any) -> None:
    rows = [f"{'train' if n % 2 else 'test'}/{'xy'[n % 3 > 0]}/q{n % 5}_{n}" for n in range(40)]
    old = {row: f"g{n // 4}" for n, row in enumerate(rows)}
    cache = make("a", *rows, groups=old)
    new = whole(cache, fractions=HALVES)
    assert {path: group for path, (_, group) in placed(new).items()} == old
    assert all(len(found) == 1 for found in splits_of_groups(new).values())
    assert [*new.splits] == ["train", "valid", "test"]
    named = whole(cache, fractions=HALVES, group_by=r"(q\d)_", rebuild=True)
    assert set(splits_of_groups(named)) == {f"q{n}" for n in range(5)}
    assert all(len(found) == 1 for found in splits_of_groups(named).values())
    with pytest.warns(FeatcacheWarning, match="--group-by matches no file name of x, y"):
        kept = whole(cache, fractions=HALVES, group_by=r"(z)", rebuild=True)
    assert placed(kept) == placed(new)


def test_a_pattern_without_fractions_only_names_the_groups(make: Any, whole: Any) -> None:
    rows = [f"{s}/x/{s}{n % 2}/{n}" for n in range(6) for s in ("train", "test")]
    new = whole(make("a", *rows), group_by_path=r"^(\w+)/", prefix=True, rename={"x": "y"})
    assert placed(new) == {
        f"a/{row}": (row.split("/")[0], f"a/{row.split('/')[2]}") for row in rows
    }


def test_a_table_and_a_pattern(make: Any, whole: Any, tmp_path: Path) -> None:
    """The table relabels and chooses; the pattern names groups, by the class of old."""
    rows = [f"all/{'xy'[n % 2]}/p{n % 8}/{n}" for n in range(32)]
    cache = make("a", *rows)
    table = write_table(
        tmp_path / "t.csv", [(row, "yx"[n % 2], "one") for n, row in enumerate(rows[:24])],
        "path,target,group",
    )  # fmt: skip
    # rows of make lie in a folder all/, so that the class is not the first folder
    new = whole(cache, table=table, fractions=HALVES, group_by_path=r"/(p\d)/")
    assert len(placed(new)) == 24
    assert set(splits_of_groups(new)) == {f"p{n}" for n in range(8)}
    assert all(len(found) == 1 for found in splits_of_groups(new).values())
    splits = write_table(tmp_path / "s.csv", [(row, "test") for row in rows], "path,split")
    text = refused(tmp_path, ConfigError, cache, table=splits, fractions=HALVES, rebuild=True)
    assert "--fractions: expected a --table without splits" in text


def test_what_cannot_be_split_is_refused(make: Any, tmp_path: Path) -> None:
    cache = make("a", *(f"all/x/{n}" for n in range(9)), "all/y/1", "all/y/2")
    text = refused(tmp_path, DataError, cache, fractions=HALVES)
    assert "class y: expected at least 3 images of different groups" in text
    assert "--classes" in text
    assert open_cache(select(cache.path, tmp_path / "x.h5", classes=["x"], fractions=HALVES).cache)
    assert "add up to 1" in refused(tmp_path, ConfigError, cache, fractions=(0.5, 0.2, 0.2))
    text = refused(tmp_path, ConfigError, cache, group_by="(a)", group_by_path="(a)")
    assert "not both" in text
    assert "--seed: expected --fractions" in refused(tmp_path, ConfigError, cache, seed=3)


@pytest.mark.filterwarnings("ignore:.*same bytes")
def test_views_move_out_of_train_and_not_into_it(tmp_path: Path, tiny_backbone: Backbone) -> None:
    raw = write_patients(tmp_path / "raw")
    extract(raw, tmp_path / "a.h5", backbone=tiny_backbone, views=2, augment="flip")
    new = open_cache(select(tmp_path / "a.h5", tmp_path / "b.h5", fractions=HALVES).cache)
    assert [split.num_views for split in new.splits.values()] == [2, 1, 1]
    text = refused(tmp_path, CacheError, new, fractions=HALVES, seed=1)
    assert "views of split train: expected 2 of each row, found 1" in text


def test_failed_images_go_with_their_group_and_two_splits_of_an_image_become_one(
    make: Any, whole: Any
) -> None:
    failures = [Failure(f"all/x/p{n % 8}_bad{n}", "all", 0, "broken", 1, 1) for n in range(4)] + [
        Failure("all/y/lonely_bad", "all", 1, "broken", 1, 1)
    ]
    cache = make("a", *(f"all/{'xy'[n % 2]}/p{n % 8}_{n}" for n in range(32)), failures=failures)
    new = whole(cache, fractions=HALVES, group_by=r"(p\d)_", seed=2)
    places = {group: name for group, found in splits_of_groups(new).items() for name in found}
    assert {f.path: f.split for f in new.failures} == {
        f.path: places.get(f.path.split("/")[2][:2], "train") for f in failures
    }
    twice = {"train/x/1": 5, "test/x/2": 5}
    rows = [f"{s}/x/{n}" for n, s in ((1, "train"), (2, "test"), (3, "train"), (4, "test"))]
    merged = whole(make("b", *rows, images=twice), fractions=(0.5, 0, 0.5), rebuild=True)
    splits = {path: name for path, (name, _) in placed(merged).items()}
    assert splits["train/x/1"] == splits["test/x/2"]


def test_several_labels_are_split_by_their_rarest(tmp_path: Path) -> None:
    targets = np.zeros((60, 2))
    targets[:12, 1] = targets[::2, 0] = 1
    cache = write_cache(
        tmp_path / "m.h5", np.ones((60, 3), np.float32), targets, [f"{n:02}" for n in range(60)],
        classes=["common", "rare"], identity=IDENTITY,
    )  # fmt: skip
    new = open_cache(select(cache.path, tmp_path / "n.h5", fractions=HALVES).cache)
    rare = {name: int(rows.targets[:, 1].sum()) for name, rows in new.splits.items()}
    assert rare == {"train": 6, "valid": 3, "test": 3}
