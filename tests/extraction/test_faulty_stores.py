"""Stores over HTTP that fail as real ones do: every row is there, equal to the disk's, or listed.

S3, Google Cloud Storage, the Hub and a web server by a server of our own, where s3fs, gcsfs,
huggingface_hub or aiohttp is installed; S3 by moto, with faults in front of it, with ``--long``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.config import conf
from sample_images import write_tree
from sample_shards import write_hugging_face, write_webdataset
from sample_stores import FAULTS, Stores, moto_server

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import open_cache
from featcache.data import remote, store_requests
from featcache.data.dataset import scan
from featcache.errors import DataError, FeatcacheWarning
from featcache.extraction.extraction import extract

NEEDED = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp"}
KINDS = ("folder", "tars", "parquet")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("faulty") / "tree", {"train": 6, "valid": 3})


@pytest.fixture(scope="module")
def folders(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The images as a folder, in tars and in Parquet files."""
    made = tmp_path_factory.mktemp("shards")
    return {
        "folder": tree, "tars": write_webdataset(tree, made / "tars"),
        "parquet": write_hugging_face(tree, made / "parquet", compression="none"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def wanted(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone
) -> dict[str, str]:
    """Content hash of the cache of each folder of this machine."""
    made = tmp_path_factory.mktemp("wanted")
    for kind, folder in folders.items():
        extract(folder, made / f"{kind}.h5", backbone=tiny_backbone)
    return {kind: open_cache(made / f"{kind}.h5").content_sha256 for kind in folders}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Stores], None]]:
    """Lets the libraries of all stores go to a server of this test, and lose patience soon."""

    def go(stores: Stores) -> None:
        for name, value in stores.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
        limits = {"config_kwargs": {"read_timeout": 3}}
        monkeypatch.setenv("FSSPEC_S3", json.dumps(limits))  # of the process that reads Parquet
        monkeypatch.setitem(conf, "s3", limits)
        for protocol in ("gs", "gcs"):
            monkeypatch.setitem(conf, protocol, {"token": "anon"})
        with contextlib.suppress(ImportError):
            constants = importlib.import_module("huggingface_hub.constants")
            monkeypatch.setattr(constants, "ENDPOINT", stores.url)
            template = stores.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    monkeypatch.setattr(store_requests, "_SILENT_SECONDS", 3)
    monkeypatch.setattr(remote, "_given_up", type(remote._given_up)())
    remote._file_systems.clear()
    yield go
    remote._file_systems.clear()


def url_of(protocol: str, stores: Stores, folder: Path, kind: str) -> str:
    """Put a folder into a store and return its URL there."""
    if protocol == "hf":
        stores.put(folder, f"org/name/{kind}")
        return f"hf://datasets/org/name/{kind}"
    stores.put(folder, f"images/{kind}")
    if protocol == "http":
        return f"{stores.url}/web/images/{kind}/"
    return f"{protocol}://images/{kind}"


def need(protocol: str) -> None:
    pytest.importorskip(NEEDED[protocol])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", NEEDED)
def test_every_row_comes(
    protocol: str, kind: str, folders: dict[str, Path], wanted: dict[str, str], tmp_path: Path,
    here: Callable[[Stores], None], tiny_backbone: Backbone, tally: Callable[..., None],
) -> None:  # fmt: skip
    need(protocol)
    # One kind waits for late answers, 3 s each. The process that reads Parquet waits for 30 s.
    faults = tuple(fault for fault in FAULTS if fault != "late" or kind == "folder")
    with Stores(0.2, faults) as stores:
        here(stores)
        url = url_of(protocol, stores, folders[kind], kind)
        done = extract(url, tmp_path / "c.h5", backbone=tiny_backbone)
        assert (done.num_images, done.num_failed) == (18, 0)
        assert open_cache(tmp_path / "c.h5").content_sha256 == wanted[kind]
        assert stores.failed.total() > 1
        for fault, number in stores.failed.items():
            tally(f"gets of {protocol}", fault, number)


@pytest.mark.parametrize("protocol", NEEDED)
def test_one_request_an_image(
    protocol: str, folders: dict[str, Path], here: Callable[[Stores], None]
) -> None:
    need(protocol)
    with Stores() as stores:
        here(stores)
        dataset = scan(url_of(protocol, stores, folders["tars"], "tars"))
        stores.log.clear()
        for sample in dataset.samples:
            dataset.read(sample)
        assert len(stores.log) == len(dataset.samples) == 18


@pytest.mark.parametrize("has_tags", [True, False])
@pytest.mark.parametrize("protocol", NEEDED)
def test_an_object_that_changes_after_it_was_listed(
    protocol: str, has_tags: bool, folders: dict[str, Path], wanted: dict[str, str],
    tmp_path: Path, here: Callable[[Stores], None], tiny_backbone: Backbone,
) -> None:  # fmt: skip
    need(protocol)
    if not has_tags and protocol != "http":
        pytest.skip("all others have tags")
    with Stores(has_tags=has_tags) as stores:
        here(stores)
        url = url_of(protocol, stores, folders["folder"], "folder")
        names = [name for name in sorted(stores.objects) if "train/normal" in name]
        kept = {name: stores.objects[name] for name in names[-3:]}

        def change(number: int) -> None:
            if number == 0:  # these three, as long as before, are read later
                stores.objects |= {name: bytes(len(data)) for name, data in kept.items()}

        stores.before_get = change
        cache = tmp_path / "c.h5"
        with pytest.warns(FeatcacheWarning, match="could not be read"):
            done = extract(url, cache, backbone=tiny_backbone, max_errors=3)
        assert (done.num_images, done.num_failed) == (15, 3)
        assert all("changed since it was listed" in f.reason for f in open_cache(cache).failures)
        stores.before_get = None
        stores.objects |= kept
        assert extract(url, cache, backbone=tiny_backbone).num_failed == 0
        assert open_cache(cache).content_sha256 == wanted["folder"]


def test_credentials_that_are_renewed_late(
    folders: dict[str, Path], wanted: dict[str, str], tmp_path: Path,
    here: Callable[[Stores], None], tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    need("s3")
    file = tmp_path / "credentials"

    def issue(key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = b\n")

    with Stores() as stores:
        here(stores)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
        url = url_of("s3", stores, folders["tars"], "tars")
        issue("first")
        stores.access_keys = {"first"}
        refusals: list[int] = []

        def revoke(number: int) -> None:
            if number == 20:
                stores.access_keys = {"second"}

        def renew() -> None:
            refusals.append(1)
            if len(refusals) == 2:  # the one who asks then is refused again with the old key
                issue("second")

        stores.before_get, stores.on_refusal = revoke, renew
        done = extract(url, tmp_path / "c.h5", backbone=tiny_backbone, workers=1)
        assert (done.num_images, done.num_failed) == (18, 0)
        assert open_cache(tmp_path / "c.h5").content_sha256 == wanted["tars"]
        assert 2 <= len(refusals) <= 6


def test_a_store_that_goes_away_ends_the_run_soon(
    folders: dict[str, Path], tmp_path: Path, here: Callable[[Stores], None],
    tiny_backbone: Backbone, wanted: dict[str, str],
) -> None:  # fmt: skip
    need("hf")
    with Stores(faults=("reset",)) as stores:
        here(stores)
        url = url_of("hf", stores, folders["folder"], "folder")
        dataset = scan(url)
        stores.share = 1
        stores.log.clear()
        for sample in dataset.samples:
            with pytest.raises(DataError, match=r"tried [26] times"):
                dataset.read(sample)
        # Six tries of each of the first eight that are given up, then two of each.
        assert len(stores.log) == 8 * 6 + 10 * 2
        stores.share = 0
        extract(url, tmp_path / "c.h5", backbone=tiny_backbone)
        assert open_cache(tmp_path / "c.h5").content_sha256 == wanted["folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_moto_with_faults_in_front(
    kind: str, folders: dict[str, Path], tmp_path: Path, here: Callable[[Stores], None],
    tiny_backbone: Backbone, request: pytest.FixtureRequest, tally: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    boto3: Any = pytest.importorskip("boto3")
    tree = write_tree(tmp_path / "tree", {"train": 60, "valid": 20, "test": 20})
    folder = {
        "folder": lambda: tree, "tars": lambda: write_webdataset(tree, tmp_path / "shards"),
        "parquet": lambda: write_hugging_face(tree, tmp_path / "shards", compression="none"),
    }[kind]()  # fmt: skip
    with moto_server(request) as port:
        for seed in range(4):
            with Stores(0.1, seed=seed, upstream=port) as stores:
                here(stores)
                client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{stores.upstream}")
                client.create_bucket(Bucket="images")
                for file in filter(Path.is_file, folder.rglob("*")):
                    key = f"{kind}/{file.relative_to(folder).as_posix()}"
                    client.put_object(Bucket="images", Key=key, Body=file.read_bytes())
                remote._file_systems.clear()
                cache = tmp_path / f"{seed}.h5"
                done = extract(f"s3://images/{kind}", cache, backbone=tiny_backbone)
                assert (done.num_images, done.num_failed) == (200, 0)
                for fault, number in stores.failed.items():
                    tally("gets of s3 by moto", fault, number)
                num_gets = sum(line.startswith("GET /images/") for line in stores.log)
                tally("gets of s3 by moto", "that came", num_gets - stores.failed.total())
        extract(folder, tmp_path / "here.h5", backbone=tiny_backbone)
        hashes = {open_cache(path).content_sha256 for path in tmp_path.glob("*.h5")}
        assert len(hashes) == 1


def test_fsspec_has_not_changed_what_we_use() -> None:
    """The names of s3fs and gcsfs that are not documented, and those that are."""
    s3fs = pytest.importorskip("s3fs").S3FileSystem
    for name in ("_call_s3", "split_path", "retries"):
        assert hasattr(s3fs, name)
    gcsfs = pytest.importorskip("gcsfs").GCSFileSystem
    for name in ("_call", "url"):
        assert hasattr(gcsfs, name)
    assert hasattr(gcsfs._request, "__wrapped__")  # without gcsfs's own tries
    assert fsspec.get_filesystem_class("http").__module__ == "fsspec.implementations.http"
