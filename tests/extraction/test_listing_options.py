"""A cache remembers which images it was asked for; an update and verify --data obey it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_companions import write_busi, write_radiography
from sample_images import write_image

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import open_cache
from featcache.cache.selection import select
from featcache.errors import DataError, FeatcacheWarning
from featcache.extraction.extraction import extract, plan
from featcache.extraction.verification import verify
from featcache.heads.training import train

pytestmark = pytest.mark.usefixtures("children_here")
MASKS = "*/masks/**"


def test_an_update_and_verify_obey_what_the_cache_remembers(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    data, cache = write_radiography(tmp_path / "raw"), tmp_path / "c.h5"
    extract(data, cache, backbone=tiny_backbone, exclude=MASKS)
    assert open_cache(cache).provenance["listing"] == {"exclude": [MASKS]}
    said: list[str] = []
    assert extract(data, cache, backbone=tiny_backbone, say=said.append).status == "up to date"
    assert any("remembers" in line and MASKS in line for line in said)
    write_image(data / "COVID/images/new.png", 1000, bright=True)
    assert plan(data, cache, backbone=tiny_backbone).num_images == 19
    assert extract(data, cache, backbone=tiny_backbone).num_new == 1
    assert open_cache(cache).provenance["listing"] == {"exclude": [MASKS]}
    checked = verify(cache, data=data, backbone=tiny_backbone, samples="all")
    assert (checked.num_compared, checked.appeared, checked.vanished) == (19, (), ())
    select(cache, tmp_path / "s.h5", classes=["COVID"])
    assert verify(tmp_path / "s.h5", data=data, backbone=tiny_backbone).vanished == ()
    extract(data, cache, backbone=tiny_backbone, companions="keep")  # in addition
    assert open_cache(cache).provenance["listing"] == {"exclude": [MASKS], "companions": "keep"}
    with pytest.raises(DataError, match="--companions keep"):
        extract(data, cache, backbone=tiny_backbone, rebuild=True)  # forgets
    extract(data, cache, backbone=tiny_backbone, companions="keep", rebuild=True)
    kept = open_cache(cache)
    assert kept.provenance["listing"] == {"companions": "keep"}
    groups = dict(zip(kept.splits["all"].paths, kept.splits["all"].groups or [], strict=True))
    assert len(groups) == 37
    assert len(set(groups.values())) == 19
    assert verify(cache, data=data, backbone=tiny_backbone).appeared == ()


def test_new_options_alone_are_remembered_too(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data, cache = write_busi(tmp_path / "raw"), tmp_path / "c.h5"
    for mask in data.glob("*/*_mask*"):
        mask.rename(tmp_path / mask.name)
    extract(data, cache, backbone=tiny_backbone)
    assert "listing" not in open_cache(cache).provenance
    before = cache.read_bytes()
    assert extract(data, cache, backbone=tiny_backbone).status == "up to date"
    assert cache.read_bytes() == before
    with pytest.warns(FeatcacheWarning, match="matches nothing"):
        extract(data, cache, backbone=tiny_backbone, exclude="**/*_mask*")
    assert open_cache(cache).provenance["listing"] == {"exclude": ["**/*_mask*"]}


def test_folders_that_are_no_classes(tmp_path: Path, tiny_backbone: Backbone) -> None:
    for i in range(4):
        write_image(tmp_path / f"nih/images_00{i % 2 + 1}/images/{i}.png", i)
    summary = extract(tmp_path / "nih", tmp_path / "c.h5", backbone=tiny_backbone, no_classes=True)
    assert summary.splits == {"all": {"unlabelled": 4}}
    again = extract(tmp_path / "nih", tmp_path / "c.h5", backbone=tiny_backbone)
    assert again.status == "up to date"


def test_a_group_by_that_matches_nothing_is_warned_of_and_makes_no_groups(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    with pytest.warns(
        FeatcacheWarning, match="matches no file name of covid, normal: images of one patient may"
    ):
        extract(tree / "train", tmp_path / "c.h5", backbone=tiny_backbone, group_by=r"^(\d{8})_")
    assert all(split.groups is None for split in open_cache(tmp_path / "c.h5").splits.values())
    said: list[str] = []
    train(tmp_path / "c.h5", tmp_path / "run", hidden=(), epochs=1, valid_fraction=0.2,
          say=said.append)  # fmt: skip
    assert any("no groups" in line for line in said)


def test_a_group_by_may_name_the_patient_in_a_folder_below_the_class(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    for i in range(4):
        for c in ("a1", "b1"):
            for view in (1, 2):
                write_image(tmp_path / f"raw/{c}/patient{c[0]}{i}/view{view}.jpg", 9 * i + view)
    extract(tmp_path / "raw", tmp_path / "c.h5", backbone=tiny_backbone, group_by=r"patient(\w+)")
    groups = open_cache(tmp_path / "c.h5").splits["all"].groups
    assert groups == [f"{c}{i}" for c in "ab" for i in range(4) for _ in range(2)]
