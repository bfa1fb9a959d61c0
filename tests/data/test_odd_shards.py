"""Tars and Parquet files that are odd or hostile: refused in a line, or read right."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_network
from sample_images import write_tree
from sample_shards import images_of, write_tar

from featcache.data.dataset import scan
from featcache.errors import DataError
from featcache.extraction.extraction import extract


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("odd") / "data")


def first_image(tree: Path) -> bytes:
    return images_of(tree)[0][3]


def test_a_path_of_very_many_folders_is_refused(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a/" * 3000 + "x.png")
        info.size = len(first_image(tree))
        tar.addfile(info, io.BytesIO(first_image(tree)))
    with pytest.raises(DataError, match="a path of at most 4,096 letters and 64 folders"):
        scan(path)


def test_what_a_global_header_says_of_all_members_counts(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "g.tar"
    headers = {f"SCHILY.xattr.{n}": "x" for n in range(5_000)} | {"mtime": "1000000000.5"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for name in ("a/1.png", "b/" + "x" * 200 + ".png"):  # the second has a header of its own
            info = tarfile.TarInfo(name)
            info.size = len(first_image(tree))
            tar.addfile(info, io.BytesIO(first_image(tree)))
    samples = scan(path).samples
    assert [sample.path for sample in samples] == ["a/1.png", "b/" + "x" * 200 + ".png"]
    assert {sample.mtime_ns // 10**9 for sample in samples} == {10**9}


def test_times_after_2262_are_read(tree: Path, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "late.tar", {"a/1.png": first_image(tree)})
    os.utime(path, (10_000_000_000, 10_000_000_000))
    assert len(scan(path).samples) == 1


def test_lists_are_no_classes(tree: Path, tmp_path: Path) -> None:
    table = pa.table({"image": [first_image(tree)] * 2, "label": [["a", "b"], ["a"]]})
    pq.write_table(table, tmp_path / "lists.parquet")
    with pytest.raises(DataError, match="label"):
        scan(tmp_path / "lists.parquet", columns={"target": "label"})


def test_an_update_of_a_glob_remembers_its_columns(tree: Path, tmp_path: Path) -> None:
    images = [row for row in images_of(tree) if row[0] == "train"]
    table = pa.table({
        "image": [{"bytes": data, "path": name} for _, _, name, data in images],
        "finding": [label for _, label, _, _ in images],
    })  # fmt: skip
    (tmp_path / "pq").mkdir()
    pq.write_table(table, tmp_path / "pq" / "train-00000-of-00001.parquet")
    data, cache = f"{tmp_path}/pq/*", tmp_path / "c.h5"
    backbone = tiny_network.build()
    extract(data, cache, backbone=backbone, columns={"target": "finding"})
    assert extract(data, cache, backbone=backbone).status == "up to date"


def test_a_folder_of_a_store_may_be_called_like_a_file(tree: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    for split, label, name, data in images_of(tree):
        fs.pipe_file(f"/odd/set.parquet/{split}/{label}/{name}", data)
    assert len(scan("memory://odd/set.parquet").samples) == len(images_of(tree))
    fs.rm("/odd", recursive=True)
