"""Select: the rows of caches stand in a new one as if their images had been extracted so."""

from __future__ import annotations

import csv
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_images import write_image, write_tree
from sample_selections import IDENTITY, refused, write_table

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache, open_cache
from featcache.cache.selection import select
from featcache.cache.writing import SplitRows, write_cache, write_rows
from featcache.data.splitting import split
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheWarning
from featcache.extraction.extraction import extract
from featcache.extraction.verification import verify


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
    with pytest.warns(FeatcacheWarning, match="in more than one split: .* group"):
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


def test_leading_folders_are_ignored_only_where_the_match_is_unique(
    make: Any, tmp_path: Path
) -> None:
    for rows, line in (
        (["train/x/1", "test/x/1"], "x/1"),  # which of them?
        (["train/x/1"], "y/1"), (["train/x/1"], "test/x/1"),
    ):  # fmt: skip
        cache = make("c", *rows)
        table = write_table(tmp_path / "t.csv", [(line,)])
        assert "paths of the caches" in refused(tmp_path, DataError, cache, table=table)


def test_rows_are_found_by_names_of_files_alone_if_these_are_unique(
    make: Any, tmp_path: Path
) -> None:
    """As NIH's CSV names its images, which lie in ``images_001/images``; endings may be missing."""
    cache = make("c", "all/a/images_001/1.png", "all/a/images_002/2.png", "all/a/images_002/3")
    table = write_table(
        tmp_path / "t.csv", [("1.png", "test"), ("2", "valid"), ("9.png", "")], "path,split"
    )
    said: list[str] = []
    with pytest.warns(FeatcacheWarning, match=r"1 path of the table without a row: 9\.png"):
        summary = select(cache.path, tmp_path / "n.h5", table=table, say=said.append)
    splits = open_cache(summary.cache).splits
    assert {name: rows.paths for name, rows in splits.items()} == {
        "test": ["all/a/images_001/1.png"],
        "valid": ["all/a/images_002/2.png"],
    }  # fmt: skip
    assert said[0] == "table: 2 rows found by the name of its file"
    cache = make("d", "all/a/1.png", "all/b/1.png", "all/b/2.png")
    table = write_table(tmp_path / "t.csv", [("2.png",), ("1.png",)])
    text = refused(tmp_path, DataError, cache, table=table)
    assert "names of one file each, found 1.png, which is all/a/1.png and all/b/1.png" in text


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
    assert "kept once: 1 row, the same image under the same path" in said
    assert "groups: 1 row without one, each a group of its own" in said
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
        FeatcacheWarning, match=r"two classes for the same bytes: 1 image, .*x/1 = train/y/4"
    ):
        summary = select([a.path, b.path], tmp_path / "new.h5")
    assert summary.num_images == 4
    c = make("c", "valid/x/5", "valid/y/6", images={"valid/x/5": 9})
    with pytest.warns(FeatcacheWarning, match=r"in more than one split: 1 image,"):
        select([a.path, c.path], tmp_path / "leak.h5")


def test_another_identity_is_refused_in_one_line(
    tmp_path: Path, tree: Path, tiny_backbone: Backbone
) -> None:
    for name, options in {
        "a": {}, "b": {"crop_mode": "center", "limit": 9}, "c": {"feature_dtype": "float16"},
    }.items():  # fmt: skip
        extract(tree, tmp_path / f"{name}.h5", backbone=tiny_backbone, **options)
    a, b, c = (open_cache(tmp_path / f"{name}.h5") for name in "abc")
    assert "cache identity: expected crop_mode squash, as " in refused(tmp_path, CacheError, a, b)
    text = refused(tmp_path, CacheError, a, c)
    assert f"feature_dtype float32, as {a.path} has, found feature_dtype float16" in text
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
    assert (facts["precision"], facts["parity"]) == ("fp16, fp32", [1e-6, 2e-6, 8e-3])
    assert facts["row_precisions"] == {"all": [["fp32", 2], ["fp16", 2]]}
    assert facts["num_probed"] == 3
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
    for nonsense in ("low", [None], {"a": 1}, [[1]], [-1e-6], [1e300]):
        assert "numbers as parity" in refused(tmp_path, CacheError, made("odd", "fp32", nonsense))


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
