"""A table moves rows to other splits, classes and groups; views, failures, several labels."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_selections import IDENTITY, refused, write_table

from featcache.cache.reading import Cache, Failure, open_cache
from featcache.cache.selection import select
from featcache.cache.writing import write_cache
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheWarning

# ---------------------------------------------------------------------- classes, splits, groups


def test_classes_match_by_name_and_are_said(make: Any, whole: Any, said: list[str]) -> None:
    a = make("a", "all/normal/1", "all/covid/2")
    b = make("b", "all/flu/3", "all/normal/4")
    new = whole(a, b, say=said.append)
    assert new.classes == ("covid", "flu", "normal")
    rows = new.splits["all"]
    for path, target in zip(rows.paths, rows.targets, strict=True):
        assert new.classes[target] == path.split("/")[1]
    assert f"classes of {b.path}: flu, normal" in said
    assert "classes now: covid, flu, normal" in said


def test_classes_are_dropped_and_renamed_and_failures_follow(make: Any, tmp_path: Path) -> None:
    names = [f"{s}/{c}/{i}" for s in ("train", "test") for c in "abcd" for i in range(2)]
    failures = [Failure(f"train/{c}/f", "train", t, "cut", 5, 6) for t, c in enumerate("abcd")]
    failures.append(Failure("train/?/f", "train", -1, "odd", 7, 8))
    cache = make("c", *names, "test/?/9", failures=failures)
    summary = select(
        cache.path, tmp_path / "n.h5", rename={"b": "a", "c": "d", "d": "c"}, classes=["a", "d"]
    )
    new = open_cache(tmp_path / "n.h5")
    assert new.classes == ("a", "d")  # a and b; what was c
    for name, extra in (("train", 0), ("test", 1)):
        rows = new.splits[name]
        assert len(rows) == 6 + extra
        for path, target in zip(rows.paths, rows.targets.tolist(), strict=True):
            assert target == {"a": 0, "b": 0, "c": 1, "?": -1}[path.split("/")[1]]
    assert [(f.path, f.target, f.reason) for f in new.failures] == [
        ("train/?/f", -1, "odd"), ("train/a/f", 0, "cut"), ("train/b/f", 0, "cut"),
        ("train/c/f", 1, "cut"),
    ]  # fmt: skip
    assert (summary.num_other_classes, summary.num_failed) == (4, 4)
    assert summary.splits == {"train": {"a": 4, "d": 2},
                              "test": {"unlabelled": 1, "a": 4, "d": 2}}  # fmt: skip


def test_invalid_class_names_and_renamings_are_refused(make: Any, tmp_path: Path) -> None:
    cache = make("c", "train/a/1", "train/b/2", "test/a/3", "test/b/4")
    for options, wanted in (
        ({"classes": ["flu\x1b"]}, r"--classes: expected some of a, b, found flu\x1b"),
        ({"classes": []}, "--classes: expected some of a, b, found none"),
        ({"rename": {"x": "y"}}, "--rename: expected OLD=NEW, OLD one of a, b, found x=y"),
        ({"rename": {"a": ""}}, "--rename: expected OLD=NEW"),
    ):
        assert wanted in refused(tmp_path, ConfigError, cache, **options)
    for options, wanted in (
        ({"rename": {"a": "B "}}, "differ by more than case and blanks"),
        ({"rename": {"a": "x\0"}}, "without NUL"),
    ):
        assert wanted in refused(tmp_path, DataError, cache, **options)


def test_splits_of_different_classes_are_refused(make: Any, tmp_path: Path) -> None:
    cache = make("c", "train/a/1", "train/b/2", "test/a/3", "test/b/4")
    table = write_table(tmp_path / "t.csv", [("train/a/1",), ("train/b/2",), ("test/a/3",)])
    text = refused(tmp_path, DataError, cache, table=table)
    assert "classes: expected the same in every split, found 'b' in train but not in test" in text
    assert str(table) in text
    # a class without any row is gone, and that is said
    said: list[str] = []
    table = write_table(tmp_path / "u.csv", [("train/a/1",), ("test/a/3",)])
    select(cache.path, tmp_path / "n.h5", table=table, say=said.append)
    assert open_cache(tmp_path / "n.h5").classes == ("a",)
    assert "classes now: a" in said


def test_a_table_says_what_it_leaves_out_and_what_is_not_there(
    make: Any, tmp_path: Path, said: list[str]
) -> None:
    failures = [Failure("train/a/broken", "train", 0, "cut", 5, 6),
                Failure("train/a/unnamed", "train", 0, "cut", 5, 6)]  # fmt: skip
    cache = make("c", *(f"train/a/{i}" for i in range(9)), failures=failures)
    rows = [("./train/a/1",), ("train//a/2",), ("train/a/broken",), ("train/a/\x1b[31m",)]
    table = write_table(tmp_path / "t.csv", [*rows, *((f"gone{i}",) for i in range(9))])
    with pytest.warns(FeatcacheWarning) as caught:
        summary = select(cache.path, tmp_path / "n.h5", table=table, say=said.append)
    assert str(caught[0].message) == (
        r"10 paths of the table without a row: train/a/\x1b[31m, gone0, gone1, gone2, gone3, ..."
    )
    assert summary.names_without_row == ("train/a/\x1b[31m", *(f"gone{i}" for i in range(9)))
    assert summary.num_unnamed == 7
    assert "left out: 7 rows that the table does not name, such as train/a/0" in said
    new = open_cache(tmp_path / "n.h5")
    assert new.splits["train"].paths == ["train/a/1", "train/a/2"]
    assert [f.path for f in new.failures] == ["train/a/broken"]


def test_empty_and_missing_columns_of_a_table_change_nothing(make: Any, tmp_path: Path) -> None:
    """A missing or empty column changes nothing; in others an empty cell is as in ``extract``."""
    rows = [f"train/{c}/{i}" for c in "ab" for i in range(2)]
    cache = make("c", *rows, groups={row: row[6] for row in rows})

    def made(cells: list[tuple[str, ...]], header: str) -> Cache:
        table = write_table(tmp_path / "t.csv", cells, header)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FeatcacheWarning)
            summary = select(cache.path, tmp_path / "n.h5", table=table, rebuild=True)
        return open_cache(summary.cache)

    for cells, header in (
        ([(row,) for row in rows], "path"),
        ([(row, "", "", "") for row in rows], "path,target,split,group"),
    ):
        assert made(cells, header).content_sha256 == cache.content_sha256
        assert open_cache(tmp_path / "n.h5").splits["train"].groups == list("aabb")
    part = [(row, *cells) for row, cells in zip(rows, [
        ("'=x", "val", "p"), ("", "val", ""), ("", "", ""), ("'=x", "", "p"),
    ], strict=True)]  # fmt: skip
    new = made(part, "path,target,split,group")
    assert new.classes == ("=x",)
    assert {n: (s.paths, s.targets.tolist(), s.groups) for n, s in new.splits.items()} == {
        "valid": (rows[:2], [0, -1], ["p", rows[1]]), "all": (rows[2:], [-1, 0], [rows[2], "p"]),
    }  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), [
    ("target\nx\n", "CSV header"),
    ("path,Split\ntrain/a/1,test\n", "found 'Split' (split?)"),
    ("path,label\ntrain/a/1,b\n", "--columns target=label"),
    ("path,split\ntrain/a/1,dev\n", "split column: expected train, valid or test, found 'dev'"),
    ("path\ntrain/a/1\n./train/a/1\n", "every path once, found train/a/1 twice"),
    ("path\nelsewhere/1\n", "paths of the caches, such as train/a/1, found none, but such as else"),
    ("path\n", "found no lines"),
    (b"path\n\xff\n", "UTF-8"),
    (None, "No such file"),
])  # fmt: skip
def test_a_malformed_table_is_refused(
    make: Any, tmp_path: Path, text: str | bytes | None, wanted: str
) -> None:
    table = tmp_path / "t.csv"
    if text is not None:
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
    cache = make("c", "train/a/1")
    assert wanted in refused(tmp_path, DataError, cache, table=table)


def test_a_table_s_columns_are_named_by_options_and_others_are_told(
    make: Any, tmp_path: Path, said: list[str]
) -> None:
    cache = make("c", "train/a/1", "train/a/2")
    table = write_table(tmp_path / "t.csv", [("train/a/1", "x", "9"), (" train/a/2 ", "y", "8")],
                        "path,label,age")  # fmt: skip
    select(cache.path, tmp_path / "n.h5", table=table, columns={"target": "label"}, say=said.append)
    assert open_cache(tmp_path / "n.h5").classes == ("x", "y")
    assert "table: columns that are not used: age" in said
    select(cache.path, tmp_path / "m.h5", table=table, ignore_columns=["label", "age"])
    assert open_cache(tmp_path / "m.h5").classes == ("a",)
    with pytest.raises(ConfigError, match="--columns: expected a --table"):
        select(cache.path, tmp_path / "o.h5", columns={"target": "label"})


def test_names_that_are_not_utf8_are_named_by_their_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    cache = write_cache(
        tmp_path / "c.h5", np.ones((2, 2), np.float32), [0, 0], [name, "b"], classes=["x"]
    )
    table = write_table(tmp_path / "t.csv", [("caf\\udce9.png", "test")], "path,split")
    select(cache.path, tmp_path / "n.h5", table=table)
    assert open_cache(tmp_path / "n.h5").splits["test"].paths == [name]


def test_groups_are_joined_and_what_has_none_is_its_own(
    make: Any, whole: Any, said: list[str]
) -> None:
    a = make("a", "all/x/1", "all/x/2", groups={"all/x/1": "p", "all/x/2": "q"})
    b = make("b", "all/x/3", "all/x/4")
    c = make("c", "all/x/5", groups={"all/x/5": "p"})
    new = whole(a, b, c, say=said.append)
    assert new.splits["all"].groups == ["p", "q", "all/x/3", "all/x/4", "p"]
    assert "groups: 2 rows without one, each a group of its own" in said
    assert "groups: 1 in several caches, such as p; each is one group" in said
    new.path.unlink()
    assert whole(b).splits["all"].groups is None


def test_rows_of_all_beside_train_are_warned_of(make: Any, tmp_path: Path) -> None:
    a, b = make("a", "train/x/1", "train/y/2"), make("b", "all/x/3", "all/y/4")
    with pytest.warns(FeatcacheWarning, match="some rows are in split all, others in train"):
        select([a.path, b.path], tmp_path / "n.h5")
    assert list(open_cache(tmp_path / "n.h5").splits) == ["train", "all"]


def test_views_of_features_made_elsewhere(make: Any, tmp_path: Path) -> None:
    cache = make("c", "train/x/1", "train/x/2", "valid/x/3", views={"train": 3})
    table = write_table(tmp_path / "t.csv", [("train/x/1", "train"), ("train/x/2", "valid"),
                                             ("valid/x/3", "valid")], "path,split")  # fmt: skip
    select(cache.path, tmp_path / "n.h5", table=table)
    new = open_cache(tmp_path / "n.h5")
    assert new.splits["train"].features.shape == (1, 3, 3)
    assert new.splits["valid"].features.shape == (2, 3)
    train = cache.splits["train"].features
    assert new.splits["train"].features[0].tolist() == train[0].tolist()
    assert new.splits["valid"].features[0].tolist() == train[1, 0].tolist()
    swap = write_table(tmp_path / "s.csv", [("train/x/1", "valid"), ("train/x/2", "train"),
                                            ("valid/x/3", "train")], "path,split")  # fmt: skip
    new.path.unlink()
    text = refused(tmp_path, CacheError, cache, table=swap)
    assert "views of split train: expected 3 of each row, found 1 of 1, such as valid/x/3" in text


def test_the_smallest_number_of_views_is_kept_of_every_row(make: Any, whole: Any) -> None:
    a = make("a", "train/x/1", "test/x/2", views={"train": 2, "test": 4})
    b = make("b", "test/x/3", views={"test": 3})
    test = whole(a, b).splits["test"]
    assert test.features.shape == (2, 3, 3)
    assert test.features[0].tolist() == a.splits["test"].features[0, :3].tolist()
    assert test.features[1].tolist() == b.splits["test"].features[0].tolist()


def test_failures_are_carried_over_once_unless_another_cache_has_read_them(
    make: Any, whole: Any
) -> None:
    failures = [Failure(f"train/x/{i}", "train", 0, "cut", 5, 6) for i in (2, 3)]
    a = make("a", "train/x/1", failures=failures)
    b = make("b", "train/x/2", "train/a/4", failures=[
        Failure("train/x/3", "train", 1, "cut", 5, 6), Failure("train/x/5", "train", 1, "cut", 5, 6)
    ])  # fmt: skip
    new = whole(a, b)
    assert new.classes == ("a", "x")
    assert [(f.path, f.target) for f in new.failures] == [("train/x/3", 1), ("train/x/5", 1)]
    new.path.unlink()
    new = whole(a, b, prefix=True)
    assert [f.path for f in new.failures] == [
        "a/train/x/2", "a/train/x/3", "b/train/x/3", "b/train/x/5",
    ]  # fmt: skip


def test_several_labels_an_image(tmp_path: Path) -> None:
    nan = float("nan")

    def made(name: str, classes: list[str], targets: Any, paths: str) -> Cache:
        return write_cache(
            tmp_path / f"{name}.h5", {"train": np.ones((len(paths), 3), np.float32)},
            {"train": np.array(targets)}, {"train": list(paths)}, classes=classes,
            identity=IDENTITY,
        )  # fmt: skip

    a = made("a", ["viral", "edema", "bacterial"],
             [[0, 1, 1], [0, nan, nan], [0, 0, 0]], "pqr")  # fmt: skip
    b = made("b", ["mass", "edema"], [[1, 0]], "s")
    both = {"viral": "pneumonia", "bacterial": "pneumonia"}
    summary = select([a.path, b.path], tmp_path / "n.h5", rename=both)
    new = open_cache(tmp_path / "n.h5")
    assert (new.task, new.classes) == ("multilabel", ("edema", "mass", "pneumonia"))
    wanted = [[1, nan, 1], [nan, nan, nan], [0, nan, 0], [0, 1, nan]]
    np.testing.assert_array_equal(new.splits["train"].targets, wanted)
    assert summary.splits == {"train": {"edema": 1, "mass": 1, "pneumonia": 1}}
    select(a.path, tmp_path / "n2.h5", classes=["edema"], table=write_table(
        tmp_path / "t.csv", [("p", "test")], "path,split"
    ))  # fmt: skip
    assert open_cache(tmp_path / "n2.h5").splits["test"].targets.tolist() == [[1]]
    table = write_table(tmp_path / "u.csv", [("p", "edema")], "path,target")
    with pytest.raises(ConfigError, match="no targets for caches of several labels"):
        select(a.path, tmp_path / "n3.h5", table=table)
