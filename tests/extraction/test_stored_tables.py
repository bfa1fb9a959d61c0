"""CSVs and zips in stores, and CSVs here whose paths are URLs."""

from __future__ import annotations

import uuid
import zipfile
from pathlib import Path

import fsspec
import pytest
from sample_images import write_tree
from sample_stores import Stores

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import open_cache
from featcache.data import remote
from featcache.data.dataset import scan
from featcache.errors import DataError
from featcache.extraction.extraction import extract


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", {"train": 2, "valid": 1})


@pytest.fixture
def memory(tree: Path) -> str:
    """A URL of a folder in memory with the images in ``images``."""
    url = f"memory://{uuid.uuid4().hex}"
    for file in filter(Path.is_file, tree.rglob("*")):
        put(f"{url}/images/{file.relative_to(tree).as_posix()}", file.read_bytes())
    return url


def put(url: str, data: bytes) -> None:
    fs, path = fsspec.url_to_fs(url)
    fs.pipe_file(path, data)


def table_of(tree: Path, before: str) -> str:
    lines = ["path,target,split"]
    for file in sorted(filter(Path.is_file, tree.rglob("*"))):
        split, target, name = file.relative_to(tree).parts
        lines.append(f"{before}{split}/{target}/{name},{target},{split}")
    return "\n".join(lines) + "\n"


def test_a_csv_in_a_store_and_one_of_urls_equal_the_one_here(
    tree: Path, memory: str, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    (tmp_path / "images").symlink_to(tree)
    (tmp_path / "here.csv").write_text(table_of(tree, "images/"))
    (tmp_path / "urls.csv").write_text(table_of(tree, f"{memory}/images/"))
    put(f"{memory}/labels.csv", table_of(tree, "images/").encode())
    caches = []
    for number, data in enumerate(
        (tmp_path / "here.csv", f"{memory}/labels.csv", tmp_path / "urls.csv")
    ):
        extract(data, tmp_path / f"{number}.h5", backbone=tiny_backbone)
        assert extract(data, tmp_path / f"{number}.h5", backbone=tiny_backbone).num_new == 0
        caches.append(open_cache(tmp_path / f"{number}.h5"))
    here, stored, urls = caches
    assert here.content_sha256 == stored.content_sha256
    assert urls.splits["train"].image_sha256.tolist() == here.splits["train"].image_sha256.tolist()
    assert urls.splits["train"].paths[0].startswith(f"{memory}/images/train/")


@pytest.mark.parametrize(("rows", "message"), [
    (["no/1.png"], r"files that are there, found 1 of 1 missing: no/1\.png"),
    (["memory://x/1.png", "here.png"], "paths or URLs in the column path, found both"),
])  # fmt: skip
def test_a_csv_that_names_what_is_not_there(memory: str, rows: list[str], message: str) -> None:
    put(f"{memory}/labels.csv", "\n".join(["path", *rows]).encode())
    with pytest.raises(DataError, match=message):
        scan(f"{memory}/labels.csv")


def test_a_csv_of_addresses_of_the_web(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    with Stores() as stores:
        stores.put(tree, "images")
        before = f"{stores.url}/web/images/"
        (tmp_path / "urls.csv").write_text(table_of(tree, before))
        dataset = scan(tmp_path / "urls.csv")
        assert len(stores.log) == len(dataset.samples) == 6  # one question a file
        for sample in dataset.samples:
            assert dataset.read(sample) == (tree / sample.path.removeprefix(before)).read_bytes()
        del stores.objects[dataset.samples[0].path.removeprefix(f"{stores.url}/web/")]
        with pytest.raises(DataError, match="found 1 of 6 missing"):
            scan(tmp_path / "urls.csv")


def test_a_csv_that_is_not_there(memory: str) -> None:
    with pytest.raises(DataError, match="found none") as caught:
        scan(f"{memory}/labels.csv")
    assert len(str(caught.value).splitlines()) == 1


def test_a_zip_in_a_store_is_read_in_place(
    tree: Path, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "images.zip"
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("large.txt", bytes(1 << 20))
        for file in sorted(filter(Path.is_file, tree.rglob("*"))):
            archive.write(file, file.relative_to(tree).as_posix())
    put(f"{memory}/images.zip", place.read_bytes())
    here, stored = scan(place), scan(f"{memory}/images.zip")
    assert [sample.path for sample in stored.samples] == [sample.path for sample in here.samples]
    asked: list[int] = []
    plain = remote.RemoteFile.read
    monkeypatch.setattr(
        remote.RemoteFile, "read", lambda *a: asked.append(a[2]) or plain(*a)
    )  # fmt: skip
    for one, other in zip(stored.samples, here.samples, strict=True):
        assert stored.read(one) == here.read(other)
    assert len(asked) == len(here.samples)  # one get an image, little more than its bytes
    assert sum(asked) < sum(sample.image_bytes + 700 for sample in here.samples)
