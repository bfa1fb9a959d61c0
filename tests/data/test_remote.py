"""Listings of stores: page by page, gone on with after an interruption; what refuses is a line."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.config import conf
from sample_stores import Stores

from featcache.data import remote, store_requests, unfinished
from featcache.data.dataset import scan
from featcache.data.stored_files import list_all
from featcache.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No waiting, and a user's cache folder of the test's own."""
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    monkeypatch.setattr(remote, "_given_up", type(remote._given_up)())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    remote._file_systems.clear()
    yield
    remote._file_systems.clear()


def go_to(stores: Stores, patch: pytest.MonkeyPatch) -> None:
    for name, value in stores.environment().items():
        patch.setenv(name, value)
    for protocol in ("gs", "gcs"):
        patch.setitem(conf, protocol, {"token": "anon"})


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_pages_globs_and_single_objects(
    protocol: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    with Stores(page=3) as stores:
        go_to(stores, monkeypatch)
        names = [f"a/{n}.tar" for n in range(7)] + ["a/b/c d+é%.png", "a.png", "ab/1.tar"]
        stores.objects |= {f"images/{name}": name.encode() for name in names}
        url = f"{protocol}://images"
        assert sorted(remote.list_files(url)) == sorted(names)
        # Of 10 keys, 3 a page: gs begins with the last one of the page before.
        assert len(stores.log) == (4 if protocol == "s3" else 5)
        listed = remote.list_files(f"{url}/a")
        assert sorted(listed) == sorted(name[2:] for name in names if name.startswith("a/"))
        file = listed["b/c d+é%.png"]
        assert file.read(0, file.num_bytes).decode() == "a/b/c d+é%.png"
        assert [*remote.list_files(f"{url}/a.png")] == [""]
        assert sorted(remote.list_files(f"{url}/a/*.tar")) == [f"{n}.tar" for n in range(7)]
        assert sorted(remote.list_files(f"{url}/**/1.tar")) == ["a/1.tar", "ab/1.tar"]
        top, files = list_all([f"{url}/a/1.tar", f"{url}/ab"])
        assert (top, [*files]) == (url, ["a/1.tar", "ab/1.tar"])
        with pytest.raises(DataError, match="found none"):
            remote.list_files(f"{url}/a.pn")


def test_an_interrupted_listing_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("s3fs")
    with Stores(num_keys=200, page=10) as stores:
        go_to(stores, monkeypatch)
        stores.fail_after_pages = 12
        with pytest.raises(DataError, match="tried 6 times"):
            remote.list_files("s3://many/d")
        (kept,) = (tmp_path / "user" / "featcache").iterdir()
        assert kept.stat().st_mode & 0o777 == 0o600
        stores.fail_after_pages = None
        stores.log.clear()
        files = remote.list_files("s3://many/d")
        assert [*files] == [f"{n:08}.png" for n in range(200)]
        assert len(stores.log) == 8
        assert not kept.exists()
        monkeypatch.setattr(store_requests, "list_page", interrupt_at(15))
        with pytest.raises(KeyboardInterrupt):
            remote.list_files("s3://many/d")
        os.utime(kept, (0, 0))  # too old
        monkeypatch.undo()
        assert unfinished.take(kept) == ("", [])
        assert not kept.exists()


def interrupt_at(number: int) -> Callable[..., Any]:
    plain, calls = store_requests.list_page, iter(range(number))

    def page(*args: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return plain(*args)

    return page


@pytest.mark.parametrize("damage", ["", '{"after": "x"', '["a", "b", "c"]\n{"after": "x"}', "[]"])
def test_a_damaged_unfinished_listing_is_not_used(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "listing.jsonl"
    place.write_text(damage)
    assert unfinished.take(place) == ("", [])


def test_a_million_keys_take_the_memory_that_is_said(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("--long lists 50,000 keys")
    pytest.importorskip("s3fs")
    import tracemalloc

    with Stores(num_keys=50_000) as stores:
        go_to(stores, monkeypatch)
        remote.list_files("s3://many/d/00000000.png")  # the library's own memory
        tracemalloc.start()
        files = remote.list_files("s3://many/d")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(files) == 50_000
        assert peak / 50_000 < 900  # bytes an object


REFUSED = [
    ("s3", "s3fs", 403, "InvalidAccessKeyId"), ("s3", "s3fs", 404, "NoSuchBucket"),
    ("gs", "gcsfs", 403, "Forbidden"), ("gs", "gcsfs", 404, "found none|storage/v1|images"),
    ("hf", "huggingface_hub", 403, "403"), ("hf", "huggingface_hub", 404, "404|not found|found"),
    ("http", "aiohttp", 403, "403"), ("http", "aiohttp", 404, "web/"),
]  # fmt: skip


@pytest.mark.parametrize(("protocol", "package", "status", "message"), REFUSED)
def test_what_refuses_is_one_line(
    protocol: str, package: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    with Stores() as stores:
        go_to(stores, monkeypatch)
        set_hub(stores.url, monkeypatch)
        stores.refuse = status
        refused(url_at(protocol, stores.url), message)
        assert len(stores.log) < 12


@pytest.mark.parametrize(("protocol", "package", "status", "message"), REFUSED[::2])
def test_a_port_that_refuses_is_one_line(
    protocol: str, package: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del status, message
    pytest.importorskip(package)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with Stores() as stores:
        go_to(stores, monkeypatch)
    for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, address)
    set_hub(address, monkeypatch)
    refused(url_at(protocol, address), "onnect")
    if protocol == "http":  # of one file fsspec says only that it is not found
        refused(f"{address}/web/data.tar", r"onnect.*\(tried 4 times\)")


@pytest.mark.parametrize(("url", "message"), [
    ("ftp://127.0.0.1/images", "data: expected the host of a ftp server, found none"),
    ("github://images", "the org and the repo of a github .* FSSPEC_GITHUB_ORG and FSSPEC_GITHUB"),
    ("packed://images", "URL: expected the package that packed:// needs, found nowhere.FileSystem"),
    ("abc://images", "a URL that fsspec knows"),
])  # fmt: skip
def test_what_fsspec_cannot_open_is_one_line(
    url: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.register_implementation("packed", "nowhere.FileSystem", clobber=True)
    refused(url, message)
    assert capsys.readouterr().err == ""


def url_at(protocol: str, address: str) -> str:
    return {
        "hf": "hf://datasets/org/name/folder", "http": f"{address}/web/images/",
    }.get(protocol, f"{protocol}://images/folder")  # fmt: skip


def set_hub(address: str, patch: pytest.MonkeyPatch) -> None:
    hub: Any = pytest.importorskip("huggingface_hub.constants")
    patch.setattr(hub, "ENDPOINT", address)


def refused(url: str, message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        scan(url)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_a_server_without_stretches(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "a").write_bytes(b"12345")
    handler = type("Quiet", (_Quiet,), {"folder": str(tmp_path)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        (file,) = remote.list_files(f"http://127.0.0.1:{server.server_port}/a").values()
        assert file.read(0, 5) == b"12345"
        with pytest.raises(ValueError, match="no stretches of files"):
            file.read(1, 2)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    folder = ""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, directory=self.folder)

    def log_message(self, *_: object) -> None:
        pass
