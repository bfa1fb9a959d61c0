"""Select: the rows of caches stand in a new one as if their images had been extracted so."""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_containers import container_of
from sample_images import write_image, write_tree

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache, Failure, open_cache
from featcache.cache.selection import SelectionSummary, select
from featcache.cache.writing import SplitRows, partial_folder, write_cache, write_rows
from featcache.data.splitting import split
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheWarning
from featcache.extraction.extraction import extract
from featcache.extraction.verification import verify
from featcache.locking import writer_lock

IDENTITY = {"backbone": "made elsewhere", "num_features": 3, "feature_dtype": "float32"}


def write_table(path: Path, rows: Iterable[Iterable[str]], header: str = "path") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def content(cache: Cache) -> dict[str, Any]:
    """Return everything a cache says of its images, by split and path."""
    return {
        name: {
            path: (
                rows.features[i].tobytes(), rows.features[i].shape,
                cache.classes[rows.targets[i]] if rows.targets[i] >= 0 else None,
                rows.groups and rows.groups[i], rows.image_sha256[i].tobytes(),
                int(rows.image_bytes[i]), int(rows.mtime_ns[i]),
            )
            for i, path in enumerate(rows.paths)
        }
        for name, rows in cache.splits.items()
    }  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Cache]:
    """Write a small cache whose images are told by a number each: ``make("a", "train/x/1")``."""

    def write(
        name: str, *rows: str, groups: Any = None, failures: Iterable[Failure] = (),
        provenance: dict[str, Any] | None = None, images: dict[str, int] | None = None,
        dtype: Any = "<f4", views: dict[str, int] | None = None,
    ) -> Cache:  # fmt: skip
        classes = sorted({row.split("/")[1] for row in rows} - {"?"})
        splits = {}
        for split_name in sorted({row.split("/")[0] for row in rows}):
            paths = sorted(row for row in rows if row.startswith(split_name + "/"))
            ids = [
                (images or {}).get(p, zlib.crc32((name + p).encode()) % 1_000_003) for p in paths
            ]
            features = (np.array([[i, i + 1, i + 2] for i in ids], "<f4") / 1024).astype(dtype)
            if views and split_name in views:
                steps = np.arange(views[split_name], dtype=dtype)[:, None]
                features = features[:, None] + steps / 8
            splits[split_name] = SplitRows(
                features.shape, features.dtype, lambda features=features: [features],
                np.array(
                    [classes.index(c) if (c := p.split("/")[1]) != "?" else -1 for p in paths],
                    np.int64,
                ),
                paths, groups and [groups[p] for p in paths],
                np.array([list(sha256(b"%d" % i).digest()) for i in ids], np.uint8),
                np.array(ids, np.int64), np.array(ids, np.int64),
            )  # fmt: skip
        return write_rows(
            tmp_path / f"{name}.h5", splits, identity=IDENTITY, provenance=provenance or {},
            classes=classes, task="multiclass", failures=list(failures),
        )  # fmt: skip

    return write


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def whole(tmp_path: Path) -> Callable[..., Cache]:
    """Select into ``new.h5``; the result is whole, and nothing lies beside it."""

    def call(*caches: Cache, **options: Any) -> Cache:
        before = {p.name for p in tmp_path.iterdir()}
        summary = select([c.path for c in caches], tmp_path / "new.h5", **options)
        assert {p.name for p in tmp_path.iterdir()} == before | {"new.h5"}
        assert isinstance(summary, SelectionSummary)
        made = open_cache(tmp_path / "new.h5")
        assert summary.num_images == sum(map(len, made.splits.values()))
        assert summary.content_sha256 == made.content_sha256
        assert sum(s["num_taken"] for s in summary.sources) == summary.num_images
        assert made.fingerprint == caches[0].fingerprint
        return made

    return call


def refused(tmp_path: Path, error: type[Exception], *caches: Cache, **options: Any) -> str:
    """Return the message of a selection that fails and leaves nothing."""
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(error) as caught:
        select([c.path for c in caches], tmp_path / "new.h5", **options)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not partial_folder(tmp_path / "new.h5").exists()
    return str(caught.value)


# ------------------------------------------------------ as if the images had been extracted so


def test_rearranged_images_extracted_anew_give_the_same_arrays(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    """Two independent ways: move the files and extract; or select by a table of the new places."""
    tree = write_tree(tmp_path / "a")
    extract(tree, tmp_path / "a.h5", backbone=tiny_backbone, group_by=r"^(\w+?\d+)_")
    old = {Path(p).name: p for s in open_cache(tmp_path / "a.h5").splits.values() for p in s.paths}
    rng = np.random.default_rng(3)
    for number, (name, path) in enumerate(sorted(old.items())):
        if number % 7 == 0:
            continue  # left out
        place = ("train", "valid", "test")[number % 3]
        label = ("viral", "normal")[int(rng.integers(2))]
        target = tmp_path / "b" / place / label / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(tree / path, target)
    extract(tmp_path / "b", tmp_path / "b.h5", backbone=tiny_backbone, group_by=r"^(\w)")
    b = open_cache(tmp_path / "b.h5")
    lines = [
        (old[Path(path).name], b.classes[target], name, group)
        for name, rows in b.splits.items()
        for path, target, group in zip(rows.paths, rows.targets, rows.groups or [], strict=True)
    ]
    table = write_table(tmp_path / "t.csv", lines, "path,target,split,group")
    with pytest.warns(FeatcacheWarning, match="groups stand in more than one split"):
        summary = select(tmp_path / "a.h5", tmp_path / "new.h5", table=table)
    new = open_cache(tmp_path / "new.h5")
    assert (new.classes, new.identity, new.task) == (b.classes, b.identity, b.task)
    assert summary.num_unnamed == len(old) - len(lines) > 0
    by_name = {
        name: {Path(path).name: row for path, row in rows.items()}
        for name, rows in content(new).items()
    }
    assert by_name == {
        name: {Path(path).name: row for path, row in rows.items()}
        for name, rows in content(b).items()
    }
    assert verify(new.path).num_rows == len(lines)


@pytest.mark.parametrize("options", [{}, {"views": 2, "augment": "flip"}])
def test_a_second_manifest_gives_the_very_cache_that_extracting_it_would(
    tmp_path: Path, tiny_backbone: Backbone, options: dict[str, Any]
) -> None:
    """Also of views: those of all become those of train, and valid and test have the plain one."""
    for label in ("covid", "normal"):
        for i in range(12):
            path = tmp_path / "raw" / label / f"{i // 2:02d}_{i % 2}.png"
            write_image(path, i, bright=label == "covid")
            if i == 5:
                path.write_bytes(b"broken " + label.encode())
    split(tmp_path / "raw", tmp_path / "one.csv", seed=1, group_by=r"^(\d+)_")
    with (tmp_path / "one.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    write_table(tmp_path / "flat.csv", [(path, target) for path, target, *_ in lines[1:]],
                "path,target")  # fmt: skip
    for name in ("flat", "one"):
        with pytest.warns(FeatcacheWarning, match="could not be read"):
            extract(
                tmp_path / f"{name}.csv", tmp_path / f"{name}.h5", backbone=tiny_backbone, **options
            )
    summary = select(tmp_path / "flat.h5", tmp_path / "new.h5", table=tmp_path / "one.csv")
    one, new = open_cache(tmp_path / "one.h5"), open_cache(tmp_path / "new.h5")
    assert list(one.splits) == ["train", "valid", "test"]
    assert one.splits["train"].num_views == options.get("views", 1)
    assert new.content_sha256 == one.content_sha256
    assert content(new) == content(one)
    assert new.failures == one.failures
    assert len(new.failures) == summary.num_failed == 2
    # and back again: the rows of valid and test lack the views that all would need
    if options:
        with pytest.raises(
            CacheError, match=r"views of split all: expected 2 of each row, found 1"
        ):
            select(new.path, tmp_path / "flat2.h5", table=write_table(
                tmp_path / "all.csv", [(path, "all") for path, *_ in lines[1:]], "path,split"
            ))  # fmt: skip
    else:
        update = extract(tmp_path / "one.csv", new.path, backbone=tiny_backbone)
        assert (update.status, update.num_new) == ("up to date", 0)


def test_a_manifest_of_the_folder_fits_the_caches_of_the_folder_and_of_its_tree(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    """``raw/covid/1.png`` is ``covid/1.png`` and ``train/covid/1.png`` there, and that is said."""
    shutil.move(write_tree(tmp_path / "data") / "train", tmp_path / "raw")
    split(tmp_path / "raw", tmp_path / "tree", seed=4)
    split(tmp_path / "raw", tmp_path / "split.csv", seed=5)
    with (tmp_path / "split.csv").open() as file:
        wanted = {(row["split"], row["path"].removeprefix("raw/")) for row in csv.DictReader(file)}
    assert len(wanted) == 24
    for name in ("raw", "tree"):
        said: list[str] = []
        extract(tmp_path / name, tmp_path / f"{name}.h5", backbone=tiny_backbone)
        summary = select(
            tmp_path / f"{name}.h5", tmp_path / f"{name}2.h5", table=tmp_path / "split.csv",
            say=said.append,
        )  # fmt: skip
        splits = open_cache(summary.cache).splits
        found = {(s, path) for s, rows in splits.items() for path in rows.paths}
        if name == "tree":
            assert found.isdisjoint(wanted)
            found = {(s, path.partition("/")[2]) for s, path in found}
        assert found == wanted
        assert said[0] == "table: its paths are read without raw/"
        assert ("read without train/" in said[1]) == (name == "tree")


def test_paths_are_read_otherwise_only_where_that_leaves_no_doubt(
    make: Any, tmp_path: Path
) -> None:
    for rows, line in (
        (["train/x/1", "test/x/1"], "x/1"),  # which of them?
        (["train/x/1"], "y/1"), (["train/x/1"], "1"), (["train/x/1"], "test/x/1"),
    ):  # fmt: skip
        cache = make("c", *rows)
        table = write_table(tmp_path / "t.csv", [(line,)])
        assert "paths of the caches" in refused(tmp_path, DataError, cache, table=table)


# --------------------------------------------------------------------------------- two hospitals


def test_two_hospitals_stand_in_one_cache(
    make: Any, whole: Any, said: list[str], tmp_path: Path
) -> None:
    a = make("a", "train/covid/1", "train/normal/2", "test/covid/3", "test/normal/4")
    b = make("b", "train/covid/5", "train/normal/6", "test/covid/7", "test/normal/0")
    new = whole(a, b, say=said.append)
    assert content(new) == {name: content(a)[name] | content(b)[name] for name in ("train", "test")}
    assert new.splits["test"].paths == ["test/covid/3", "test/covid/7", "test/normal/0",
                                        "test/normal/4"]  # fmt: skip
    sources = new.provenance["selected_from"]
    assert [(s["payload_sha256"], s["content_sha256"], s["fingerprint"], s["num_taken"])
            for s in sources] == [(c.payload_sha256, c.content_sha256, c.fingerprint, 4)
                                  for c in (a, b)]  # fmt: skip
    assert sources[0]["path"] == a.path.as_posix()
    assert said[-1].startswith(f"{new.path}: 8 images (4 of 4 of {a.path}, 4 of 4 of {b.path})")
    assert said[0] == " train: 2 covid, 2 normal"
    origins = new.provenance["origins"]
    assert [(o["path"], o["payload_sha256"]) for o in origins] == [
        (c.path.as_posix(), c.payload_sha256) for c in (a, b)
    ]
    for number in range(3):  # night after night: the list of origins neither nests nor doubles
        again = select([new.path, a.path], tmp_path / f"again{number}.h5")
        assert again.content_sha256 == new.content_sha256
        new = open_cache(again.cache)
        assert new.provenance["origins"] == origins


def test_the_order_of_the_caches_does_not_matter(make: Any, tmp_path: Path) -> None:
    a, b = make("a", "all/x/1", "all/y/3"), make("b", "all/x/2", "all/z/0")
    one = select([a.path, b.path], tmp_path / "1.h5")
    two = select([b.path, a.path], tmp_path / "2.h5")
    assert one.content_sha256 == two.content_sha256


def test_equal_paths_of_different_images_need_a_prefix(
    make: Any, whole: Any, tmp_path: Path
) -> None:
    rows = ["train/covid/1", "train/normal/2"]
    groups = dict.fromkeys(rows, "patient 1")
    a, b = make("a", *rows, groups=groups), make("b", *rows, groups=groups)
    text = refused(tmp_path, CacheError, a, b)
    assert "path train/covid/1: expected one image, found sha256 " in text
    assert "--prefix" in text
    new = whole(a, b, prefix=True)
    assert new.splits["train"].paths == [
        "a/train/covid/1", "a/train/normal/2", "b/train/covid/1", "b/train/normal/2",
    ]  # fmt: skip
    assert new.splits["train"].groups == ["a/patient 1"] * 2 + ["b/patient 1"] * 2
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(a.path, other / "a.h5")
    with pytest.raises(ConfigError, match="caches of different file names, found a twice"):
        select([a.path, other / "a.h5"], tmp_path / "x.h5", prefix=True)


def test_the_same_image_under_the_same_path_is_kept_once(
    make: Any, whole: Any, said: list[str], tmp_path: Path
) -> None:
    shared = {"train/covid/1": 77}
    a = make("a", "train/covid/1", "train/normal/2", images=shared)
    b = make("b", "train/covid/1", "train/normal/3", images=shared,
             groups={"train/covid/1": "p", "train/normal/3": "q"})  # fmt: skip
    new = whole(a, b, say=said.append)
    assert new.splits["train"].paths == ["train/covid/1", "train/normal/2", "train/normal/3"]
    assert new.splits["train"].groups == ["p", "train/normal/2", "q"]  # known there, kept
    assert "kept once: 1 rows that are the same image under the same path" in said
    assert "groups: 1 rows have none; each is a group of its own" in said
    assert select([a.path, a.path], tmp_path / "n2.h5").num_merged == 2


def test_the_same_image_must_not_contradict_itself(make: Any, whole: Any, tmp_path: Path) -> None:
    a = make("a", "train/x/1", "valid/x/1", "train/y/2", "valid/y/1", images={"train/x/1": 9})
    train_is_9 = {"train/x/1": 9, "train/y/2": 9}
    path, other = "train/x/1", {"train/x/1": 10}
    # the same content, other features: one of the two caches lies
    b = make("b", "train/x/1", "train/y/3", images=train_is_9)
    rows = b.splits["train"]
    lie = np.array(rows.features)
    lie[0] *= 1.01
    write_rows(
        b.path, {"train": SplitRows(
            lie.shape, lie.dtype, lambda: [lie], np.array(rows.targets), rows.paths, None,
            np.array(rows.image_sha256), np.array(rows.image_bytes), np.array(rows.mtime_ns),
        )}, identity=b.identity, provenance={}, classes=b.classes, task=b.task,
    )  # fmt: skip
    text = refused(tmp_path, CacheError, a, open_cache(b.path))
    assert f"features of {path}: expected those of" in text
    assert "found others, by 9.9e-03" in text
    assert "verify" in text
    # another content
    c = make("c", "train/x/1", "train/y/3", images=other)
    assert "expected one image" in refused(tmp_path, CacheError, a, c)
    # another class, another split, another group: a table settles them
    table = write_table(tmp_path / "class.csv", [("train/x/1", "y"), ("train/y/5", "x")],
                        "path,target")  # fmt: skip
    relabelled = select(
        make("d", "train/x/1", "train/y/5", images=train_is_9).path, tmp_path / "d2.h5", table=table
    )
    d = open_cache(relabelled.cache)
    text = refused(tmp_path, CacheError, a, d)
    assert "expected one class, found x in" in text
    assert "--table of path,target" in text
    moved = write_table(tmp_path / "split.csv", [("train/x/1", "valid"), ("train/y/3", "valid")],
                        "path,split")  # fmt: skip
    e = make("e", "train/x/1", "train/y/3", images=train_is_9)
    select(e.path, tmp_path / "e2.h5", table=moved)
    text = refused(tmp_path, CacheError, a, open_cache(tmp_path / "e2.h5"))
    assert "expected one split, found train in" in text
    f, g = (
        make(n, "train/x/1", images=train_is_9, groups={"train/x/1": n}) for n in ("f", "g")
    )  # fmt: skip
    assert "expected one group, found f in" in refused(tmp_path, CacheError, f, g)
    settled = write_table(tmp_path / "g.csv", [("train/x/1", "x", "test", "p")],
                          "path,target,split,group")  # fmt: skip
    new = whole(d, open_cache(tmp_path / "e2.h5"), f, g, table=settled)
    assert {n: (s.paths, s.groups) for n, s in new.splits.items()} == {
        "test": (["train/x/1"], ["p"])
    }


def test_images_of_several_names_are_kept_and_contradictions_are_said(
    make: Any, tmp_path: Path
) -> None:
    a = make("a", "train/x/1", "train/y/2", images={"train/x/1": 9})
    b = make("b", "train/x/3", "train/y/4", images={"train/y/4": 9})
    with pytest.warns(
        FeatcacheWarning, match=r"1 byte-identical images have two classes.*x/1 = train/y/4"
    ):
        summary = select([a.path, b.path], tmp_path / "new.h5")
    assert summary.num_images == 4
    c = make("c", "valid/x/5", "valid/y/6", images={"valid/x/5": 9})
    with pytest.warns(FeatcacheWarning, match=r"1 images stand in more than one split"):
        select([a.path, c.path], tmp_path / "leak.h5")


def test_another_identity_is_refused_in_one_line(
    tmp_path: Path, tree: Path, tiny_backbone: Backbone
) -> None:
    for name, options in {
        "a": {}, "b": {"crop_mode": "center", "limit": 9}, "c": {"feature_dtype": "float16"},
    }.items():  # fmt: skip
        extract(tree, tmp_path / f"{name}.h5", backbone=tiny_backbone, **options)
    a, b, c = (open_cache(tmp_path / f"{name}.h5") for name in "abc")
    assert "cache identity: expected crop_mode 'squash', as " in refused(tmp_path, CacheError, a, b)
    text = refused(tmp_path, CacheError, a, c)
    assert f"feature_dtype 'float32', as {a.path} has, found feature_dtype 'float16'" in text
    assert str(c.path) in text


def test_caches_of_one_identity_must_have_one_width_dtype_and_task(
    make: Any, tmp_path: Path
) -> None:
    a = make("a", "all/x/1", "all/y/2")
    b = make("b", "all/x/3", "all/y/4", dtype="<f2")
    assert "expected 3 x float32, as" in refused(tmp_path, CacheError, a, b)
    several = write_cache(
        tmp_path / "m.h5", np.ones((2, 3), np.float32), np.ones((2, 1)), ["p", "q"], classes=["x"],
        identity=IDENTITY,
    )  # fmt: skip
    assert "expected a multiclass task" in refused(tmp_path, CacheError, a, several)


def test_other_precision_is_warned_of_and_bad_parity_refused(make: Any, tmp_path: Path) -> None:
    def made(name: str, precision: str, parity: Any, **more: Any) -> Cache:
        facts = {"precision": precision, "parity": parity, "engine": "eager", "device": "a GPU",
                 "batch_size": 64, "num_threads": 1, "device_type": "cuda", **more}  # fmt: skip
        return make(name, f"all/x/{name}1", f"all/y/{name}2", provenance=facts)

    a = made("a", "fp32", [1e-6, 2e-6], truncated=["all/x/a1", "gone"])
    b = made("b", "fp16", [8e-3], truncated=[])
    with pytest.warns(FeatcacheWarning) as caught:
        select([a.path, b.path], tmp_path / "new.h5", prefix=True)
    text = str(caught[0].message)
    assert f"{a.path} fp32 (parity 2.0e-06), {b.path} fp16 (parity 8.0e-03)" in text
    facts = open_cache(tmp_path / "new.h5").provenance
    assert (facts["precision"], facts["parity"]) == ("fp16", [1e-6, 2e-6, 8e-3])
    assert facts["truncated"] == ["a/all/x/a1"]
    assert (facts["engine"], facts["device"]) == ("eager", "a GPU")
    assert "device_type" not in facts  # an update must not go on as if all were made alike
    assert [origin["precision"] for origin in facts["origins"]] == ["fp32", "fp16"]
    # of one engine and precision: nothing to warn of, and an update goes on as before
    select([a.path, made("c", "fp32", [3e-6]).path], tmp_path / "alike.h5")
    facts = open_cache(tmp_path / "alike.h5").provenance
    assert (facts["device_type"], facts["batch_size"], facts["num_threads"]) == ("cuda", 64, 1)
    assert facts["parity"] == [1e-6, 2e-6, 3e-6]
    (tmp_path / "new.h5").unlink()
    bad = made("bad", "fp32", [8e-3])
    text = refused(tmp_path, CacheError, a, bad)
    assert "parity of the cache: expected at most 1e-04 at fp32, found 8.0e-03" in text
    for nonsense in ("low", [None], {"a": 1}, [[1]], [-1e-6], [10**400]):
        assert "numbers as parity" in refused(tmp_path, CacheError, made("odd", "fp32", nonsense))


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


def test_what_a_class_or_name_cannot_be_is_refused(make: Any, tmp_path: Path) -> None:
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


def test_every_split_has_the_same_classes_or_it_is_refused(make: Any, tmp_path: Path) -> None:
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
        r"10 paths of the table have no row: train/a/\x1b[31m, gone0, gone1, gone2, gone3, ..."
    )
    assert summary.names_without_row == ("train/a/\x1b[31m", *(f"gone{i}" for i in range(9)))
    assert summary.num_unnamed == 7
    assert "left out: 7 rows that the table does not name, such as train/a/0" in said
    new = open_cache(tmp_path / "n.h5")
    assert new.splits["train"].paths == ["train/a/1", "train/a/2"]
    assert [f.path for f in new.failures] == ["train/a/broken"]


def test_cells_of_the_table(make: Any, tmp_path: Path) -> None:
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
    ("path,split\ntrain/a/1,dev\n", "split column: expected train, valid or test, found 'dev'"),
    ("path\ntrain/a/1\n./train/a/1\n", "every path once, found train/a/1 twice"),
    ("path\nelsewhere/1\n", "paths of the caches, such as train/a/1, found none, but such as else"),
    ("path\n", "found no lines"),
    (b"path\n\xff\n", "UTF-8"),
    (None, "No such file"),
])  # fmt: skip
def test_a_table_that_is_none_is_refused(
    make: Any, tmp_path: Path, text: str | bytes | None, wanted: str
) -> None:
    table = tmp_path / "t.csv"
    if text is not None:
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
    cache = make("c", "train/a/1")
    assert wanted in refused(tmp_path, DataError, cache, table=table)


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
    assert "groups: 2 rows have none; each is a group of its own" in said
    assert "groups: 1 are in several caches, such as p; each is one group" in said
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


def test_of_views_that_differ_the_first_ones_are_taken(make: Any, whole: Any) -> None:
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


# ------------------------------------------------------------------------------ whole or absent


def test_what_is_there_stays_unless_it_is_to_be_rebuilt(make: Any, tmp_path: Path) -> None:
    a, b = make("a", "all/x/1", "all/y/2"), make("b", "all/x/3", "all/y/4")
    for source in (a.path, tmp_path / "." / "a.h5", os.path.relpath(a.path)):
        with pytest.raises(ConfigError, match="NEW: expected another file than the caches"):
            select([source, b.path], a.path, rebuild=True)
    (tmp_path / "link.h5").symlink_to(a.path)
    with pytest.raises(ConfigError, match="another file than"):
        select([a.path], tmp_path / "link.h5", rebuild=True)
    with pytest.raises(CacheError, match=r"found a cache that is there already.*--rebuild"):
        select(a.path, b.path)
    (tmp_path / "letter").write_text("dear")
    for place in (tmp_path / "letter", tmp_path):
        with pytest.raises(CacheError, match="something that is no cache"):
            select(a.path, place, rebuild=True)
    assert (tmp_path / "letter").read_text() == "dear"
    partial_folder(tmp_path / "new.h5").mkdir()
    (partial_folder(tmp_path / "new.h5") / "manifest.json").write_text("{}")
    with pytest.raises(CacheError, match="an unfinished extraction of that name"):
        select(a.path, tmp_path / "new.h5")
    assert (partial_folder(tmp_path / "new.h5") / "manifest.json").exists()
    with pytest.raises(ConfigError):
        select(a.path, tmp_path / "new.h5", classes=["z"], rebuild=True)
    assert (partial_folder(tmp_path / "new.h5") / "manifest.json").exists()
    select(a.path, tmp_path / "new.h5", rebuild=True)
    (tmp_path / ".new.h5.77.tmp").write_bytes(b"of a run that was killed")
    damaged = bytearray((tmp_path / "new.h5").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "new.h5").write_bytes(damaged)
    made = select(b.path, tmp_path / "new.h5", rebuild=True)
    assert made.content_sha256 == b.content_sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.h5", "b.h5", "letter", "link.h5", "new.h5",
    ]  # fmt: skip


def test_one_writer(make: Any, tmp_path: Path) -> None:
    a = make("a", "all/x/1", "all/y/2")
    with (
        writer_lock(partial_folder(tmp_path / "new.h5") / "lock", "cache new.h5"),
        pytest.raises(
            CacheError, match=f"no other writer, found one at work: process {os.getpid()}"
        ),
    ):
        select(a.path, tmp_path / "new.h5")
    assert not (tmp_path / "new.h5").exists()


def test_damaged_and_odd_sources_are_refused(make: Any, tmp_path: Path) -> None:
    a = make("a", "all/x/1", "all/y/2")
    b = make("b", "all/x/3", "all/y/4", images={"all/x/3": 3})
    for value in (np.nan, np.inf):
        odd = write_cache(
            tmp_path / "odd.h5", np.ones((2, 3), np.float32), [0, 0], ["p", "q"], classes=["x"],
            identity=IDENTITY,
        )  # fmt: skip
        data = bytearray(odd.path.read_bytes())
        entry = odd.container.arrays["splits/all/features"]
        data[entry.offset + 12 : entry.offset + 16] = np.float32(value).tobytes()
        odd.path.write_bytes(data)
        assert "payload sha256" in refused(tmp_path, CacheError, a, odd)
    for value in (np.nan, np.inf):  # whole, but not finite
        features = np.array([[1, 2, 3], [4, value, 6]], "<f4")
        zeros = np.zeros(2, np.int64)
        rows = SplitRows((2, 3), features.dtype, lambda features=features: [features], zeros,
                         ["p", "q"], None, np.zeros((2, 32), np.uint8), zeros, zeros)  # fmt: skip
        odd = write_rows(odd.path, {"all": rows}, identity=IDENTITY, provenance={}, classes=["x"],
                         task="multiclass")  # fmt: skip
        assert "features of q: expected finite numbers" in refused(tmp_path, CacheError, a, odd)
    b.path.unlink()
    assert "no such file" in refused(tmp_path, CacheError, a, b)
    with pytest.raises(ConfigError, match="CACHE: expected one or more, found none"):
        select([], tmp_path / "new.h5")
    assert "at least one row" in refused(
        tmp_path, CacheError,
        write_cache(tmp_path / "e.h5", np.empty((0, 3), np.float32), np.empty(0, int), [],
                    classes=["x"]),
    )  # fmt: skip


@pytest.mark.parametrize("change", [
    {"identity": b'{"a": 1}'}, {"identity": b'{"a":NaN}'}, {"provenance": b'{"a":NaN}'},
])  # fmt: skip
def test_json_that_another_program_wrote_is_no_crash(
    tmp_path: Path, change: dict[str, bytes]
) -> None:
    container_of(tmp_path / "odd.h5", **{key: np.array(text) for key, text in change.items()})
    assert "JSON" in refused(tmp_path, CacheError, open_cache(tmp_path / "odd.h5"))


def test_truncated_images_stay_marked(tmp_path: Path, tree: Path, tiny_backbone: Backbone) -> None:
    for path in sorted((tree / "train" / "covid").glob("*.jpg"))[:3]:
        path.write_bytes(path.read_bytes()[:-200])
    extract(tree, tmp_path / "a.h5", backbone=tiny_backbone, truncated="keep")
    whole = open_cache(tmp_path / "a.h5")
    truncated = whole.provenance["truncated"]
    assert len(truncated) == 3
    table = write_table(tmp_path / "t.csv", [
        (path,) for s in whole.splits.values() for path in s.paths if path != truncated[0]
    ])  # fmt: skip
    select(tmp_path / "a.h5", tmp_path / "n.h5", table=table)
    assert open_cache(tmp_path / "n.h5").provenance["truncated"] == truncated[1:]


def test_features_larger_than_memory_are_streamed(tmp_path: Path) -> None:
    """40 MB of features go through in blocks: what is allocated stays far below."""
    block = np.ones((500, 1000), "<f4")
    for name in "ab":
        zeros = np.zeros(5000, np.int64)
        rows = SplitRows((5000, 1000), block.dtype, lambda: (block for _ in range(10)), zeros,
                         [f"{name}{i:05d}" for i in range(5000)], None,
                         np.zeros((5000, 32), np.uint8), zeros, zeros)  # fmt: skip
        write_rows(tmp_path / f"{name}.h5", {"all": rows}, identity=IDENTITY, provenance={},
                   classes=["x"], task="multiclass")  # fmt: skip
    tracemalloc.start()
    try:
        summary = select([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "n.h5")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert summary.num_images == 10_000
    assert peak < 24 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE as on Linux")
def test_a_full_disk_says_what_is_needed_and_leaves_nothing(make: Any, tmp_path: Path) -> None:
    import resource

    a = make("a", *(f"all/{c}/{i}" for c in "xy" for i in range(300)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        text = refused(tmp_path, CacheError, a)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(r"disk space: expected [\d,]+ bytes, found [\d,]+ bytes free", text)
