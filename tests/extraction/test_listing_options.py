"""A cache remembers which images it was asked for; an update and verify --data obey it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import TINY, assert_one_line_error, command
from sample_companions import write_busi, write_radiography
from sample_images import write_image

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import open_cache
from featcache.cache.selection import select
from featcache.errors import DataError, FeatcacheWarning
from featcache.extraction.extraction import extract, plan
from featcache.extraction.verification import verify
from featcache.heads.training import train

MASKS = "*/masks/**"


def test_every_command_asks_the_same_question_before_it_writes(tmp_path: Path) -> None:
    write_radiography(tmp_path / "raw", 4)
    for arguments in (
        ["extract", "raw", "c.h5", *TINY],
        ["extract", "raw", "c.h5", *TINY, "--dry-run"],
        ["split", "raw", "data"],
    ):
        done = command(*arguments, cwd=tmp_path)
        assert_one_line_error(done, "COVID/masks/COVID-1.png of COVID/images/COVID-1.png", MASKS)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    done = command("extract", "raw", "c.h5", *TINY, "--exclude", MASKS, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["num_images"] == 12
    done = command("train", "c.h5", "run", "--hidden", "none", "--epochs", 1,
                   "--valid-fraction", 0.3, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = command("predict", "run", "raw/COVID", *TINY, cwd=tmp_path)
    assert_one_line_error(done, "masks/COVID-1.png of images/COVID-1.png", "'masks/**'")
    for option, number in ((["--exclude", "masks/**"], 4), (["--companions", "keep"], 8)):
        done = command("predict", "run", "raw/COVID", *TINY, *option, "--json", cwd=tmp_path)
        assert len(json.loads(done.stdout)["predictions"]) == number


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
    with pytest.warns(FeatcacheWarning, match="matches none of 24 file names"):
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
