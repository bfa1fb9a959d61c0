"""Split images by URL: the same split as of the local folder, and a CSV that extract reads."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import fsspec
import pytest
from command_line import assert_one_line_error
from sample_folders import PATIENT, write_files
from sample_images import write_tree
from sample_shards import write_webdataset
from sample_stores import Stores, moto_bucket, upload

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import open_cache
from featcache.data import remote
from featcache.data.dataset import scan
from featcache.data.splitting import split
from featcache.errors import DataError
from featcache.extraction.extraction import extract

pytestmark = pytest.mark.usefixtures("no_waiting")

QUIET: dict[str, Any] = {"say": lambda _: None}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Class folders of 30 patients with one to three images each; two images are copies."""
    images: dict[str, str | None] = {
        f"{'ab'[n % 2]}/p{n}_{i}.png": None for n in range(30) for i in range(1 + n % 3)
    }
    return write_files(tmp_path / "raw", images | {"a/p0_9.png": "copy", "a/p14_9.png": "copy"})


def rows_of(file: Path, top: str) -> list[tuple[str, ...]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return sorted(
            (row["path"].removeprefix(top), row["target"], row["split"], row["group"])
            for row in csv.DictReader(opened)
        )


def test_the_split_of_a_store_is_that_of_the_folder(raw: Path, tmp_path: Path, memory: str) -> None:
    upload(raw, memory)
    said: list[str] = []
    here = split(raw, tmp_path / "here.csv", group_by=PATIENT, **QUIET)
    there = split(memory, tmp_path / "there.csv", group_by=PATIENT, say=said.append)
    assert rows_of(tmp_path / "there.csv", f"{memory}/") == rows_of(tmp_path / "here.csv", "raw/")
    assert (there.counts, there.num_groups, there.num_identical, there.mode) == (
        here.counts, here.num_groups, 2, "csv"
    )  # fmt: skip
    assert any(line.startswith("listed 62 objects") for line in said)
    assert any(line.startswith("reading 62 images") for line in said)
    kept, source = scan(tmp_path / "there.csv"), scan(memory)
    assert {s.path for s in kept.samples} == {f"{memory}/{s.path}" for s in source.samples}
    split(Path(memory), tmp_path / "again.csv", group_by=PATIENT, **QUIET)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "there.csv").read_bytes()


@pytest.mark.parametrize("place", ["store", "here", "urls here"])
def test_a_csv_in_a_store_or_of_urls(raw: Path, tmp_path: Path, memory: str, place: str) -> None:
    upload(raw, memory)
    start = f"{memory}/" if place == "urls here" else "raw/" if place == "here" else ""
    lines = [f"{start}{s.path},{s.path[0]},{s.path[2:5]}" for s in scan(raw).samples]
    text = "\n".join(["path,target,group", *lines])
    (tmp_path / "all.csv").write_text(text)
    fs, path = fsspec.url_to_fs(memory)
    fs.pipe_file(f"{path}/all.csv", text.encode())
    source = f"{memory}/all.csv" if place == "store" else tmp_path / "all.csv"
    split(source, tmp_path / "lists" / "out.csv", **QUIET)
    named = "../raw/" if place == "here" else f"{memory}/"
    rows = rows_of(tmp_path / "lists" / "out.csv", named)
    assert [row[0] for row in rows] == sorted(s.path for s in scan(raw).samples)
    assert len(scan(tmp_path / "lists" / "out.csv").samples) == 62


def test_extract_reads_the_csv(tmp_path: Path, tiny_backbone: Backbone, memory: str) -> None:
    tree = write_tree(tmp_path / "tree", {"train": 6}) / "train"
    upload(tree, memory)
    split(memory, tmp_path / "out.csv", fractions=(0.6, 0.2, 0.2), **QUIET)
    split(tree, tmp_path / "here.csv", fractions=(0.6, 0.2, 0.2), **QUIET)
    made = []
    for name in ("out", "here"):
        extract(tmp_path / f"{name}.csv", tmp_path / f"{name}.h5", backbone=tiny_backbone)
        cache = open_cache(tmp_path / f"{name}.h5")
        made.append({
            (split_name, sha256.tobytes(), features.tobytes())
            for split_name, part in cache.splits.items()
            for sha256, features in zip(part.image_sha256, part.features, strict=True)
        })  # fmt: skip
    assert made[0] == made[1]
    assert len(made[0]) == 12


def test_what_is_refused_in_one_line(
    raw: Path, tmp_path: Path, memory: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(raw, f"{memory}/raw")
    upload(write_webdataset(write_tree(tmp_path / "t"), tmp_path / "w"), f"{memory}/tars")
    for source, target, *parts in (
        ("raw", "tree", "a new .csv for a SOURCE by URL"), ("raw", f"{memory}/out.csv", "a URL"),
        ("tars", "out.csv", "found layout tar", "select CACHE NEW --fractions"),
        ("tars/*.tar", "out.csv", "found layout tar"), ("nowhere", "out.csv", "found none"),
        ("nowhere.csv", "out.csv", "found none"),
    ):  # fmt: skip
        assert_one_line_error(run("split", f"{memory}/{source}", target), *parts)
    (tmp_path / "all.csv").write_text(f"path\n{memory}/raw/a/p0_0.png\n{memory}/gone.png\n")
    assert_one_line_error(run("split", "all.csv", "out.csv"), f"1 of 2 missing: {memory}/gone.png")
    plain = remote.RemoteFile.read

    def change_first(file: remote.RemoteFile, *stretch: int) -> bytes:
        fs, path = fsspec.url_to_fs(memory)
        fs.pipe_file(f"{path}/raw/a/p14_9.png", b"other")
        return plain(file, *stretch)

    monkeypatch.setattr(remote.RemoteFile, "read", change_first)
    result = run("split", f"{memory}/raw", "out.csv")
    assert_one_line_error(result, "has changed since it was listed", f"{memory}/raw: a/p14_9.png")
    assert not [*tmp_path.glob("out*")]


def test_a_store_that_refuses(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    remote._file_systems.clear()
    with Stores() as stores:
        for name, value in stores.environment().items():
            monkeypatch.setenv(name, value)
        for status, message in ((403, "InvalidAccessKeyId"), (404, "NoSuchBucket|does not exist")):
            stores.refuse = status
            result = run("split", "s3://images/raw", "out.csv")
            assert_one_line_error(result, "s3://images/raw")
            assert any(part in result.err for part in message.split("|")), result.err
    remote._file_systems.clear()


def test_s3_over_http(raw: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with moto_bucket(request, "split") as client:
        upload(raw, "s3://split/raw")
        for source, name in (("s3://split/raw", "there"), (raw, "here")):
            split(source, tmp_path / f"{name}.csv", group_by=PATIENT, **QUIET)
        there = rows_of(tmp_path / "there.csv", "s3://split/raw/")
        assert there == rows_of(tmp_path / "here.csv", "raw/")
        dataset = scan(tmp_path / "there.csv")
        first = dataset.samples[0]
        assert dataset.read(first)
        key = first.path.removeprefix("s3://split/")
        client.put_object(Bucket="split", Key=key, Body=bytes(first.image_bytes))
        with pytest.raises(DataError, match="changed since it was listed"):
            dataset.read(first)
