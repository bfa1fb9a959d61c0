"""Images by URL are those of the disk: a store in memory, and S3 by moto's server over HTTP.

The latter with ``--long`` and s3fs and moto[server] installed: the server takes seconds to start.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from sample_images import write_tree
from sample_shards import write_hugging_face, write_tar, write_webdataset
from sample_stores import moto_bucket, upload

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache, open_cache
from featcache.data import remote
from featcache.data.dataset import scan
from featcache.errors import ConfigError, DataError, FeatcacheWarning
from featcache.extraction.extraction import extract, plan
from featcache.extraction.verification import verify

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(
        tmp_path_factory.mktemp("urls") / "tree", {"train": 6, "valid": 3, "test": 3}
    )  # fmt: skip


@pytest.fixture(scope="module")
def s3(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A client of moto's server, with a bucket ``images``."""
    with moto_bucket(request, "images") as client:
        yield client


def rows_of(cache: Cache) -> dict[tuple[str, bytes], bytes]:
    return {
        (name, sha.tobytes()): features.tobytes()
        for name, part in cache.splits.items()
        for sha, features in zip(part.image_sha256, part.features, strict=True)
    }


@pytest.mark.parametrize("kind", ["folder", "tars", "parquet"])
def test_a_store_in_memory_equals_the_disk(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, memory: str, kind: str
) -> None:
    here = {
        "folder": lambda: tree, "tars": lambda: write_webdataset(tree, tmp_path / "t"),
        "parquet": lambda: write_hugging_face(tree, tmp_path / "p"),
    }[kind]()  # fmt: skip
    url = upload(here, memory)
    paths = [sample.path for sample in scan(here).samples]
    assert [sample.path for sample in scan(url).samples] == paths
    assert any("listed" in note for note in scan(url).notes)
    for data, name in ((here, "here.h5"), (url, "there.h5")):
        extract(data, tmp_path / name, backbone=tiny_backbone)
    there = tmp_path / "there.h5"
    assert rows_of(open_cache(there)) == rows_of(open_cache(tmp_path / "here.h5"))
    assert extract(Path(url), there, backbone=tiny_backbone).status == "up to date"
    assert plan(url, there, backbone=tiny_backbone).num_images == 24
    assert verify(there, data=url, backbone=tiny_backbone, samples=3).num_compared == 3


def test_globs_lists_and_single_files(tree: Path, tmp_path: Path, memory: str) -> None:
    url = upload(write_webdataset(tree, tmp_path / "t"), memory)
    wanted = [sample.path for sample in scan(url).samples]
    assert [sample.path for sample in scan(f"{url}/*.tar").samples] == wanted
    names = sorted({path.partition("/")[0] for path in wanted})
    assert [s.path for s in scan([f"{url}/{name}" for name in names]).samples] == wanted
    one = scan(f"{url}/train-00000.tar")
    assert {s.split for s in one.samples} == {"train"}
    assert all("/" not in s.path for s in one.samples)
    assert scan(f"{url}/*.tar", exclude="t*").splits == ("valid",)
    with pytest.raises(ConfigError, match="paths or URLs, found both"):
        scan([url, tmp_path])


def test_file_urls_are_paths(tree: Path) -> None:
    assert scan(f"file://{tree}").samples == scan(tree).samples


def test_what_a_store_does_not_have(memory: str) -> None:
    for url, message in (
        (memory, "objects of a store, found none|No such file|expected a store that answers"),
        (f"{memory}/a.csv", "found none"), ([f"{memory}/a.csv", f"{memory}/b"], "Name it alone"),
        ("nonsense://a/b", "a URL that fsspec knows"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message) as caught:
            scan(url)
        assert len(str(caught.value).splitlines()) == 1


def test_an_object_that_changes_or_goes_is_a_listed_failure(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, memory: str
) -> None:
    url = upload(tree, memory)
    fs, path = fsspec.url_to_fs(url)
    dataset = scan(url)
    first, second = dataset.samples[:2]
    fs.pipe_file(f"{path}/{first.path}", bytes(first.image_bytes))
    fs.rm(f"{path}/{second.path}")
    with pytest.raises(DataError, match="changed since it was listed"):
        dataset.read(first)
    with pytest.raises(DataError, match=second.path):
        dataset.read(second)
    assert scan(url).samples[0].mtime_ns != first.mtime_ns


def test_a_store_that_fails_sometimes(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, memory: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    url = upload(tree, memory)
    plain = remote.RemoteFile._get
    calls: dict[str, int] = {}

    def get(self: remote.RemoteFile, *args: Any) -> bytes:
        calls[self.url] = calls.get(self.url, 0) + 1
        number = sum(map(ord, self.url)) % 4  # how often it fails: the last kind always
        if number == 3 or calls[self.url] <= number:
            raise ConnectionError("half a body") if number % 2 else TimeoutError("late")
        return plain(self, *args)

    monkeypatch.setattr(remote.RemoteFile, "_get", get)
    cache = tmp_path / "c.h5"
    with pytest.warns(FeatcacheWarning, match="could not be read"):
        done = extract(url, cache, backbone=tiny_backbone, max_errors="100%")
    made = open_cache(cache)
    assert done.num_images + done.num_failed == 24
    assert all("tried 6 times" in failure.reason for failure in made.failures)
    monkeypatch.setattr(remote.RemoteFile, "_get", plain)
    assert extract(url, cache, backbone=tiny_backbone).num_new == done.num_failed > 0


def test_credentials_are_read_anew(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(Path(__file__).parent / "workers", memory)
    (file, *_) = remote.list_files(url).values()
    plain, refused = remote.RemoteFile._get, [True]

    def get(self: remote.RemoteFile, *args: Any) -> bytes:
        if refused.pop():
            raise PermissionError("ExpiredToken")
        return plain(self, *args)

    monkeypatch.setattr(remote.RemoteFile, "_get", get)
    refused[:] = [False, True, True]
    assert len(file.read(0, file.num_bytes)) == file.num_bytes
    refused[:] = [True] * 6
    with pytest.raises(PermissionError, match="tried 6 times"):
        file.read(0, 1)


def test_s3_over_http(tree: Path, tmp_path: Path, tiny_backbone: Backbone, s3: Any) -> None:
    kinds = {
        "folder": tree, "tars": write_webdataset(tree, tmp_path / "t"),
        "parquet": write_hugging_face(tree, tmp_path / "p", compression="none"),
    }  # fmt: skip
    extract(tree, tmp_path / "tree.h5", backbone=tiny_backbone)
    wanted = rows_of(open_cache(tmp_path / "tree.h5"))
    for kind, folder in kinds.items():
        url = f"s3://images/{kind}"
        for file in folder.rglob("*"):
            if file.is_file():
                key = f"{kind}/{file.relative_to(folder).as_posix()}"
                s3.put_object(Bucket="images", Key=key, Body=file.read_bytes())
        cache = tmp_path / f"{kind}.h5"
        extract(url, cache, backbone=tiny_backbone)
        assert rows_of(open_cache(cache)) == wanted
        assert extract(url, cache, backbone=tiny_backbone).status == "up to date"
    dataset = scan("s3://images/folder")
    first = dataset.samples[0]
    s3.put_object(Bucket="images", Key=f"folder/{first.path}", Body=bytes(first.image_bytes))
    with pytest.raises(DataError, match="changed since it was listed"):
        dataset.read(first)
    with pytest.raises(DataError, match=r"bucket does not exist.*s3://nobody/x"):
        scan("s3://nobody/x")


def test_a_tar_is_read_by_its_stretches(tmp_path: Path, s3: Any) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{n}.png": bytes([n]) * (1 << 20) for n in range(4)})
    s3.put_object(Bucket="images", Key="one/a.tar", Body=path.read_bytes())
    dataset = scan("s3://images/one/a.tar")
    asked = []
    plain = remote.RemoteFile.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            remote.RemoteFile, "read", lambda *a: asked.append(a[2]) or plain(*a)
        )  # fmt: skip
        assert dataset.read(dataset.samples[2]) == b"\2" * (1 << 20)
    assert asked == [1 << 20]
