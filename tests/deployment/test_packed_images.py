"""Classify what ``extract`` takes: tars, Parquet files, folders of these, and zips."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from sample_folders import SPLIT_TREE, plant
from sample_images import write_image
from sample_shards import write_hugging_face, write_tar, write_webdataset

from featcache.data.dataset import scan
from featcache.deployment.inputs import list_inputs
from featcache.errors import DataError


def read(images, **listing):
    inputs = list_inputs(images, **listing)
    return sorted(inputs.dataset.read(sample) for sample in inputs.images)


def test_packed_images_are_those_of_the_folder(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    plant(tree, *SPLIT_TREE)
    wanted = read(tree)
    assert len(wanted) == len(SPLIT_TREE)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in SPLIT_TREE:
            archive.write(tree / name, name)
    members = {name: (tree / name).read_bytes() for name in SPLIT_TREE}
    tar, other = (write_tar(tmp_path / name, members) for name in ("a.tar", "b.tar"))
    shards = write_webdataset(tree, tmp_path / "w")
    parquet = write_hugging_face(tree, tmp_path / "h")
    for given in (tmp_path / "a.zip", tar, shards, parquet, sorted(shards.iterdir())):
        assert read(given) == wanted
    assert read([tar, other]) == sorted(wanted * 2)
    assert list_inputs(tar).names == [sample.path for sample in scan(tar, no_classes=True).samples]
    assert len(read(tar, include="train/**")) < len(wanted)


def test_one_kind_at_a_time(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"1.png": "x"})
    write_image(tmp_path / "1.png", 0)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.png", b"x")
    for given in ([tar, tmp_path / "1.png"], [tar, tmp_path / "a.zip"]):
        with pytest.raises(DataError, match=r"found several kinds.*Name one kind at a time"):
            list_inputs(given)
