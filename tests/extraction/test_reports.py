"""A projection promises sizes and times and writes nothing."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tiny_network

from featcache.backbones.backbone import Backbone
from featcache.errors import FeatcacheWarning
from featcache.extraction.extraction import extract, plan


def test_a_plan_writes_nothing_and_projects_sizes(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    (sorted((tree / "train" / "covid").iterdir())[0]).write_bytes(b"broken")
    before = sorted(tmp_path.rglob("*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        projection = plan(tree, tmp_path / "c.h5", backbone=tiny_backbone, group_by=r"^(\w+)_")
    assert sorted(tmp_path.rglob("*")) == before
    assert projection.num_images == 46
    assert projection.splits["valid"] == {"covid": 5, "normal": 5}
    assert projection.num_groups == 24
    assert [path for path, _ in projection.failures] == ["train/covid/trc000_0.jpg"]
    assert projection.seconds >= 0
    with pytest.warns(FeatcacheWarning):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, group_by=r"^(\w+)_")
    actual = (tmp_path / "c.h5").stat().st_size
    features = 46 * tiny_network.NUM_FEATURES * 4
    assert projection.working_bytes == projection.cache_bytes + features
    assert projection.cache_bytes <= actual + features


def test_views_of_images_to_train_on_are_counted(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    plain = plan(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    projection = plan(tree, tmp_path / "c.h5", backbone=tiny_backbone, views=5, augment="xray")
    assert projection.identity["views"] == 5
    more = 24 * 4 * tiny_network.NUM_FEATURES * 4
    assert projection.cache_bytes == plain.cache_bytes + more
