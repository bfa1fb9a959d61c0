"""Tars or Parquet files by a folder, a glob or a list: the same images by the same names."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_folders import plant
from sample_shards import contents, write_tar

from featcache.data.dataset import scan
from featcache.data.listing import Listing
from featcache.data.sources import listing_for
from featcache.errors import ConfigError, DataError


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    for name in ("train/0.tar", "train/1.tar", "val/0.tar"):
        write_tar(folder / name, {"1.png": name, "1.cls": "a", "2.png": name * 2, "2.cls": "b"})
    return folder


def test_a_folder_a_glob_and_a_list_are_alike(shards, monkeypatch):
    wanted = contents(scan(shards))
    assert len(wanted) == 6
    files = sorted(shards.rglob("*.tar"))
    for data in (
        f"{shards}/**/*.tar", shards / "*/*.tar", f"{shards}/*", files, [*files[::-1], files[0]],
        [shards / "train", shards / "val/0.tar"], [f"{shards}/train/*", shards / "val"],
    ):  # fmt: skip
        assert contents(scan(data)) == wanted
    monkeypatch.chdir(shards)
    assert contents(scan("*/*.tar")) == contents(scan(["train", "val"])) == wanted
    assert scan(f"{shards}/train/[1]*").samples[0].path == "1.tar/1.png"


def test_a_list_of_one_file_has_its_name_in_the_rows(shards):
    assert scan([shards / "train/0.tar"]).samples[0].path == "0.tar/1.png"


def test_parquet_files(tmp_path):
    for name in ("train-0", "test-0"):
        pq.write_table(pa.table({"image": [b"1"], "dx": ["a"]}), tmp_path / f"{name}.parquet")
    dataset = scan(f"{tmp_path}/*.parquet", columns={"target": "dx"})
    assert {s.split: s.path for s in dataset.samples} == {
        "train": "train-0.parquet/0", "test": "test-0.parquet/0"
    }  # fmt: skip


@pytest.mark.parametrize(("data", "message"), [
    ("no/*.tar", "a glob that matches files, found no match"),
    (["no.tar"], "No such file"),
    (["folder"], "found something else"), (["t.csv"], "found something else.*join their caches"),
    ([], "found an empty list"), (["no"], "found nothing there"),
    (["x.tar", "y.parquet"], "found 1 Parquet file and 1 tar file"),
])  # fmt: skip
def test_what_is_no_list_of_shards(tmp_path, monkeypatch, data, message):
    plant(tmp_path, "folder/a/1.png", "folder/b/1.png", "t.csv", "y.parquet")
    write_tar(tmp_path / "x.tar", {"1.png": "1"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        scan(data)
    assert len(str(caught.value).splitlines()) == 1


def test_paths_and_urls_in_one_list_are_refused():
    with pytest.raises(ConfigError, match="expected paths or URLs, found both"):
        scan(["x.tar", "s3://bucket/x.tar"])


def test_a_folder_with_special_characters_is_a_path(tmp_path):
    plant(tmp_path, "data [1]/a/1.png", "data [1]/b/1.png")
    assert scan(tmp_path / "data [1]").classes == ("a", "b")


def test_what_a_cache_remembers_of_columns(shards, tmp_path):
    kept = Listing.of(columns={"target": "x"})
    for data in (shards, [shards / "train/0.tar"], f"{shards}/*/*.tar", "a.csv", "a.parquet"):
        assert listing_for(data, kept) == kept
    for data in (tmp_path / "none", "a.zip", plant(tmp_path / "f", "a/1.png")):
        assert listing_for(data, kept) == Listing()
