"""Caches side by side: rows matched by path and image, or one line that names what differs."""

from __future__ import annotations

import pickle
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_sides import CLASSES, features_of, images, write_side

from featcache.cache.reading import Failure, open_cache
from featcache.cache.side_by_side import caches_of, join_caches, list_caches, open_caches
from featcache.errors import CacheError, ConfigError

FEW = {"train": 6, "valid": 4}
BY_PATH = {row["path"]: row for split in images().values() for row in split}


def shuffled(seed: int = 1) -> dict[str, list[dict[str, Any]]]:
    """The same images under other names, so that they lie in another order."""
    rng = np.random.default_rng(seed)
    return {
        name: [row | {"path": f"{rng.integers(1 << 30)}"} for row in rows]
        for name, rows in images(FEW).items()
    }


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("renamed", [False, True])
def test_rows_are_matched_and_their_features_concatenated(
    tmp_path: Path, views: int, renamed: bool
) -> None:
    write_side(tmp_path / "a.h5", 3, rows=images(FEW), views=views)
    rows = shuffled() if renamed else images(FEW)
    write_side(tmp_path / "b.h5", 5, rows=rows, seed=1, views=views)
    joined = open_caches([tmp_path / "a.h5", tmp_path / "b.h5"])
    assert (joined.num_features, joined.classes) == (8, CLASSES)
    for name, split in joined.splits.items():
        num_views = views if name == "train" else 1
        wanted = np.stack([
            np.concatenate(
                [features_of(BY_PATH[path], w, num_views, s) for s, w in enumerate((3, 5))], 1
            )
            for path in split.paths
        ])  # fmt: skip
        wanted = wanted if num_views > 1 else wanted[:, 0]
        assert split.shape == wanted.shape
        assert split.num_views == num_views
        np.testing.assert_array_equal(split.read_features(), wanted)
        np.testing.assert_array_equal(split.features, wanted)
        some = np.array([3, 0, 2])
        np.testing.assert_array_equal(split.open_features().take(some), wanted[some])
        flat = wanted.reshape(-1, 8)
        reader = split.open_features(as_vectors=True)
        np.testing.assert_array_equal(reader.take(np.array([1, 2, 0])), flat[[1, 2, 0]])
        np.testing.assert_array_equal(
            split.read_rows(some), wanted.reshape(-1, num_views, 8)[some, 0]
        )
        blocks = [block for _, block in split.open_features().blocks(2)]
        np.testing.assert_array_equal(np.concatenate(blocks), wanted)
        assert b"".join(piece.tobytes() for piece in reader.pieces()) == wanted.tobytes()
        again = pickle.loads(pickle.dumps(split))
        np.testing.assert_array_equal(again.read_features(), wanted)
        features, target = split[1]
        np.testing.assert_array_equal(features.numpy(), wanted[1])
        assert target == BY_PATH[split.paths[1]]["target"]
        assert split.row_crc32 is None


def test_one_cache_stays_itself_and_hashes_tell_the_order(tmp_path: Path) -> None:
    a, b = (write_side(tmp_path / f"{s}.h5", 3, seed=s, rows=images(FEW)) for s in (0, 1))
    assert type(open_caches(a.path)) is type(open_caches([a.path])) is type(a)
    assert caches_of(a) == (a,)
    one, other = join_caches([a, b]), join_caches([b, a])
    for name in ("fingerprint", "payload_sha256", "content_sha256"):
        assert len({getattr(cache, name) for cache in (a, b, one, other)}) == 4
        assert len(getattr(one, name)) == 64
    assert [cache.path for cache in caches_of(other)] == [b.path, a.path]
    assert "b0 + b1" in repr(one)


def test_a_folder_stands_for_its_caches(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_side(tmp_path / f"{name}.h5", 3, seed=int(name == "b"), rows=images(FEW))
    (tmp_path / "note.txt").write_text("no cache")
    assert [path.name for path in list_caches(tmp_path)] == ["a.h5", "b.h5"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CacheError, match="which is a file, found a folder"):
        open_caches(tmp_path / "empty")
    with pytest.raises(ConfigError, match="one or more, found none"):
        open_caches([])


def test_float16_beside_float32_is_float32(tmp_path: Path) -> None:
    a = write_side(tmp_path / "a.h5", 3, rows=images(FEW), dtype="<f2")
    b = write_side(tmp_path / "b.h5", 3, rows=images(FEW), seed=1)
    split = join_caches([a, b]).splits["train"]
    assert split.dtype == split.read_features().dtype == np.float32
    np.testing.assert_array_equal(split.features[:, :3], a.splits["train"].features)
    np.testing.assert_array_equal(split.features[:, 3:], b.splits["train"].features)


def test_a_path_is_enough_where_an_image_has_no_hash_and_a_hash_is_taken_from_either(
    tmp_path: Path,
) -> None:
    rows = images(FEW)
    known = rows["train"][2]["sha256"]
    unknown = {name: [dict(row) for row in listed] for name, listed in rows.items()}
    a = write_side(tmp_path / "a.h5", 3, rows=unknown | {"train": [
        row | {"sha256": bytes(32)} if i == 2 else row for i, row in enumerate(unknown["train"])
    ]})  # fmt: skip
    b = write_side(tmp_path / "b.h5", 3, rows=rows, seed=1)
    joined = join_caches([a, b])
    assert joined.splits["train"].image_sha256[2].tobytes() == known


def test_failed_images_of_all_are_those_of_the_joined(tmp_path: Path) -> None:
    failures = [Failure(name, "train", 0, "cut off", 1, 1) for name in ("x.png", "y.png")]
    a = write_side(tmp_path / "a.h5", 3, rows=images(FEW), failures=failures[:1])
    b = write_side(tmp_path / "b.h5", 3, rows=images(FEW), seed=1, failures=failures)
    assert {failure.path for failure in join_caches([a, b]).failures} == {"x.png", "y.png"}


def change(split: str, number: int, **values: Any) -> dict[str, list[dict[str, Any]]]:
    rows = images(FEW)
    rows[split][number] |= values
    return rows


def without(split: str, number: int) -> dict[str, list[dict[str, Any]]]:
    rows = images(FEW)
    del rows[split][number]
    return rows


def moved() -> dict[str, list[dict[str, Any]]]:
    rows = without("train", 1)
    rows["valid"].append(images(FEW)["train"][1])
    return rows


OTHER = sha256(b"other").digest()
TWIN = images(FEW)["train"][3]["sha256"]
FAILED = [Failure("train/001.png", "train", 0, "too many pixels", 1, 1)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": change("train", 3, target=0)},
         "split train, target of train/003.png: expected normal, as in a.h5, found covid"),
        ({"rows": change("valid", 1, target=-1)}, "valid/001.png.* found unlabelled"),
        ({"rows": change("train", 4, group="q")},
         "group of train/004.png: expected train2, as in a.h5, found q"),
        ({"groups": False}, "groups of split train: expected some, as in a.h5, found none"),
        ({"rows": change("train", 2, sha256=OTHER)}, "image of train/002.png: expected sha256 "),
        ({"rows": without("train", 1)},
         "split train, train/001.png: expected the same image in each cache, found only in a.h5"),
        ({"rows": without("train", 1), "failures": FAILED}, "it failed there: too many pixels"),
        ({"rows": moved()}, "split train, train/001.png: .* found it in split valid"),
        ({"rows": change("train", 1, path="new", sha256=TWIN)}, "split train, train/001.png: "),
        ({"rows": change("train", 1, path="new", sha256=bytes(32))}, "train/001.png.*only in a.h5"),
        ({"rows": images(FEW | {"train": 7})}, r"train/006.png.*only in b.h5 \(.*a.h5\)"),
        ({"rows": images(FEW | {"test": 2})}, "splits: expected train, valid, as in a.h5, found"),
        ({"classes": ("covid", "pneumonia")}, "classes: expected covid, normal, .*pneumonia"),
        ({"identity": {"backbone": "b0", "image_size": 32}}, "same identity as .*a.h5"),
        ({"views": 2}, "views of split train: expected 1 of each row, as in a.h5, found 2"),
    ],
)  # fmt: skip
def test_caches_that_differ_are_refused_in_one_line(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    a = write_side(tmp_path / "a.h5", 3, rows=images(FEW))
    b = write_side(tmp_path / "b.h5", 3, **({"rows": images(FEW), "seed": 1} | options))
    with pytest.raises(CacheError, match=said) as refused:
        open_caches([a.path, b.path])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (
            (*"abcdefghijklmnopqrst", "z0"),
            (*"abcdefghijklmnopqrst", "z1"),
            "classes: expected z0, .* found z1",
        ),
        (("a", "b, c"), ("a", "b", "c"), "classes: expected b, c, as in a.h5, found b "),
    ],
)
def test_all_classes_count_not_only_those_that_are_listed(
    tmp_path: Path, ours: tuple[str, ...], theirs: tuple[str, ...], said: str
) -> None:
    a = write_side(tmp_path / "a.h5", 3, rows=images(FEW), classes=ours)
    b = write_side(tmp_path / "b.h5", 3, rows=images(FEW), classes=theirs, seed=1)
    with pytest.raises(CacheError, match=said):
        join_caches([a, b])


def test_images_of_other_collections_tasks_and_augmentations_are_refused(tmp_path: Path) -> None:
    views: dict[str, Any] = {"rows": images(FEW), "views": 2}
    a = write_side(tmp_path / "a.h5", 3, **views)
    b = write_side(tmp_path / "b.h5", 3, seed=1, identity={"augmentation": "xray"}, **views)
    with pytest.raises(CacheError, match=r"views of split train: expected crop, as in a.h5, found"):
        join_caches([a, b])
    labels = {
        name: [row | {"target": [row["target"], np.nan]} for row in rows]
        for name, rows in images(FEW).items()
    }
    c = write_side(tmp_path / "c.h5", 3, rows=labels, task="multilabel")
    with pytest.raises(
        CacheError, match=r"task: expected multiclass, as in a.h5, found multilabel"
    ):
        join_caches([a, c])
    labels["train"][0] |= {"target": [1 - labels["train"][0]["target"][0], np.nan]}
    d = write_side(tmp_path / "d.h5", 3, rows=labels, task="multilabel", seed=1)
    with pytest.raises(CacheError, match=r"covid 0, normal unknown, as in c.h5, found covid 1"):
        join_caches([open_cache(c.path), d])
