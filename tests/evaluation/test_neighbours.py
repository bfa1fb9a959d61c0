"""Neighbours: the nearest rows, against scikit-learn, by rows and by image files."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_images import write_tree
from sample_stores import upload
from sklearn.neighbors import NearestNeighbors

import featcache
from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache
from featcache.evaluation import neighbours as module
from featcache.evaluation.neighbours import neighbours


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    rng = np.random.default_rng(0)
    features = {
        s: rng.normal(size=(n, 5)).astype(np.float32) for s, n in (("train", 9), ("all", 6))
    }
    features["all"][2] = 0
    return featcache.write_cache(
        tmp_path / "c.h5", features,
        {"train": [0, 1, -1] * 3, "all": [0] * 6},
        {s: [f"{s}/{i}" for i in range(len(f))] for s, f in features.items()},
        classes=["covid", "normal"], groups={"train": list("aabbccdde")},
    )  # fmt: skip


def test_all_rows_in_blocks_as_scikit_learn_finds_them(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 8 * 5 * 4)  # four rows
    said: list[str] = []
    found = neighbours(cache.path, "train/3", k=100, say=said.append)
    names = [path for split in cache.splits.values() for path in split.paths]
    rows = np.concatenate([split.features for split in cache.splits.values()])
    query = rows[names.index("train/3")]
    search = NearestNeighbors(n_neighbors=15, metric="cosine").fit(rows)
    distances, numbers = search.kneighbors(query[None])
    wanted = [(names[i], d) for i, d in zip(numbers[0], distances[0], strict=True) if i != 3]
    assert [row["path"] for row in found.rows] == [name for name, _ in wanted]
    np.testing.assert_allclose(
        [row["distance"] for row in found.rows], [d for _, d in wanted], atol=1e-6
    )
    assert (found.is_row, found.num_rows, len(found.rows)) == (True, 14, 14)
    by_path = {row["path"]: row for row in found.rows}
    assert by_path["train/1"]["target"] == "normal"
    assert by_path["train/2"]["target"] is None
    assert (by_path["train/8"]["group"], by_path["all/0"]["group"]) == ("e", None)
    assert by_path["all/2"]["cosine"] == 0
    assert by_path["all/0"]["is_same_image"] is None
    assert len(said) == 15


def test_an_image_file_goes_through_the_caches_backbone(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    tree = write_tree(tmp_path / "data", {"train": 3, "test": 2})
    featcache.extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, say=lambda _: None)
    image = tree / "test" / "covid" / "tec000_0.jpg"
    found = neighbours(tmp_path / "c.h5", image, k=2, backbone=tiny_backbone, say=lambda _: None)
    first = found.rows[0]
    assert (first["path"], first["is_same_image"]) == ("test/covid/tec000_0.jpg", True)
    assert first["cosine"] == pytest.approx(1, abs=1e-6)
    assert (found.is_row, found.num_rows, len(found.rows)) == (False, 10, 2)
    by_row = neighbours(tmp_path / "c.h5", first["path"], k=1, say=lambda _: None)
    assert by_row.rows[0]["path"] == found.rows[1]["path"]
    url = upload(tree / "test" / "covid", f"memory://{uuid.uuid4().hex}")
    there = neighbours(
        tmp_path / "c.h5", Path(f"{url}/tec000_0.jpg"), k=2, backbone=tiny_backbone,
        say=lambda _: None,
    )  # fmt: skip
    assert (there.query, there.rows) == (f"{url}/tec000_0.jpg", found.rows)
    with pytest.raises(featcache.DataError, match=f"found none .{url}/gone.png"):
        neighbours(tmp_path / "c.h5", f"{url}/gone.png", backbone=tiny_backbone)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    with pytest.raises(featcache.DataError, match="one that can be read"):
        neighbours(tmp_path / "c.h5", tmp_path / "bad.png", backbone=tiny_backbone)


def test_refusals(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    for image, options, said in (
        ("train/33", {}, "The cache has train/3"), ("all/2", {}, "only zeros"),
        ("all/1", {"k": 0}, "1 or more"), (tmp_path / "x.png", {}, "made elsewhere"),
        (tmp_path, {}, "a folder"),
    ):  # fmt: skip
        with pytest.raises(featcache.FeatcacheError, match=said):
            neighbours(cache.path, image, **dict[str, Any](options))
