"""A small server of objects that speaks as S3, Google Cloud Storage, the Hugging Face Hub and a web
server do, and fails as they do: on 127.0.0.1, or in front of another server there.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import http.client
import http.server
import json
import logging
import re
import socket
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from featcache.data import remote

FAULTS = ("503", "500", "reset", "late", "half", "half without a length")
_XML = '<?xml version="1.0" encoding="UTF-8"?>'


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


class Stores:
    """Objects in buckets. Whether a get of one fails is decided by its path and its number.

    Args:
        share: How many of the gets of objects fail.
        faults: How: of ``FAULTS``.
        seed: Another one gives other failures.
        upstream: Port of a server whose answers are passed on in place of own ones.
        page: The most keys of a page.
        num_keys: A bucket ``many`` of so many empty objects.
        has_tags: Whether the web server tells ETags.
    """

    def __init__(
        self, share: float = 0, faults: tuple[str, ...] = FAULTS, *, seed: int = 0,
        upstream: int = 0, page: int = 1000, num_keys: int = 0, has_tags: bool = True,
    ) -> None:  # fmt: skip
        self.objects: dict[str, bytes] = {}
        self.share, self.faults, self.seed, self.upstream = share, faults, seed, upstream
        self.page, self.num_keys, self.has_tags = page, num_keys, has_tags
        self.access_keys: set[str] | None = None  # that are allowed
        self.before_get: Callable[[int], None] | None = None  # called with how many there were
        self.on_refusal: Callable[[], None] | None = None
        self._num_gets = 0
        self.log: list[str] = []
        self.failed: Counter[str] = Counter()
        self.fail_after_pages: int | None = None
        self.refuse = 0  # status of every answer
        self._tries: Counter[str] = Counter()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"stores": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> Stores:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def put(self, folder: Path, bucket: str) -> None:
        """Add the files of a folder as objects of a bucket, or of a folder in one."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                key = f"{bucket}/{file.relative_to(folder).as_posix()}"
                self.objects[key] = file.read_bytes()

    def environment(self) -> dict[str, str]:
        """Return the variables by which the libraries of all stores come here."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "first",
            "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "STORAGE_EMULATOR_HOST": self.url, "FSSPEC_GCS_TOKEN": "anon",
            "FSSPEC_GS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "HF_ENDPOINT": self.url,
        }  # fmt: skip

    def choose_fault(self, path: str) -> str:
        """Return how a get fails, "" if it does not."""
        with self._lock:
            self._tries[path] += 1
            text = f"{self.seed} {path} {self._tries[path]}".encode()
            number = zlib.crc32(hashlib.sha256(text).digest())
            if number % 10_000 >= 10_000 * self.share:
                return ""
            fault = self.faults[number // 10_000 % len(self.faults)]
            self.failed[fault] += 1
            return fault

    def count_get(self) -> None:
        """Count a get of an object, before it is answered."""
        with self._lock:
            if self.before_get is not None:
                self.before_get(self._num_gets)
            self._num_gets += 1

    # ------------------------------------------------------------------------------------ answers

    def answer(self, method: str, target: str, headers: Mapping[str, str]) -> Answer:
        """Return what a request gets, failures aside."""
        if self.refuse:
            code = "InvalidAccessKeyId" if self.refuse == 403 else "NoSuchBucket"
            return _s3_error(self.refuse, code)
        parts = urlsplit(target)
        path = unquote(parts.path).lstrip("/")
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if path.startswith(("storage/v1/b/", "download/storage/v1/b/")):
            return self._google(parts.path, asked, headers)
        if path.startswith("api/"):
            return self._hub(path)
        if match := re.fullmatch(r"datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._send(f"{match[1]}/{match[2]}", headers, hub=True)
        if path.startswith("web/"):
            return self._web(path[4:], headers)
        if self.access_keys is not None:
            given = re.search(r"Credential=([^/]+)/", headers.get("Authorization", ""))
            if given is None or given[1] not in self.access_keys:
                if self.on_refusal is not None:
                    self.on_refusal()
                return _s3_error(403, "InvalidAccessKeyId")
        if self.upstream:
            return self._pass_on(method, target, headers)
        bucket, _, key = path.partition("/")
        if not key and "list-type" in asked:
            return self._list_s3(bucket, asked)
        return self._send(path, headers)

    def keys(self, bucket: str, prefix: str, after: str) -> Iterator[tuple[str, int]]:
        """Yield the keys of a bucket with their sizes, sorted."""
        if bucket == "many":
            first = int(after.rpartition("/")[2].partition(".")[0]) + 1 if after else 0
            yield from ((f"d/{n:08}.png", 100 + n % 7) for n in range(first, self.num_keys))
            return
        for name in sorted(self.objects):
            start, key = name[: len(bucket) + 1], name[len(bucket) + 1 :]
            if start == bucket + "/" and key.startswith(prefix) and key > after:
                yield key, len(self.objects[name])

    def _take_page(self, bucket: str, prefix: str, after: str, most: int) -> list[tuple[str, int]]:
        """Return one key more than a page has, if there are more."""
        found = []
        for item in self.keys(bucket, prefix, after):
            found.append(item)
            if len(found) > min(most, self.page):
                break
        return found

    def _tag(self, name: str) -> str:
        data = self.objects.get(name)
        return hashlib.md5(name.encode() if data is None else data).hexdigest()

    def _list_s3(self, bucket: str, asked: Mapping[str, str]) -> Answer:
        if bucket != "many" and not any(name.startswith(bucket + "/") for name in self.objects):
            return _s3_error(404, "NoSuchBucket")
        if self.fail_after_pages is not None:
            self.fail_after_pages -= 1
            if self.fail_after_pages < 0:
                return _s3_error(503, "SlowDown")
        after = asked.get("continuation-token") or asked.get("start-after", "")
        most = int(asked.get("max-keys", 1000))
        found = self._take_page(bucket, asked.get("prefix", ""), after, most)
        rest, found = found[min(most, self.page) :], found[: min(most, self.page)]
        items = "".join(
            f"<Contents><Key>{quote(key)}</Key><LastModified>2026-01-01T00:00:00.000Z"
            f"</LastModified><ETag>&quot;{self._tag(f'{bucket}/{key}')}&quot;</ETag>"
            f"<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key, size in found
        )
        more = (
            f"<NextContinuationToken>{quote(found[-1][0])}</NextContinuationToken>" if rest else ""
        )
        text = (
            f"{_XML}<ListBucketResult><Name>{bucket}</Name><EncodingType>url</EncodingType>"
            f"<KeyCount>{len(found)}</KeyCount><IsTruncated>{'true' if rest else 'false'}"
            f"</IsTruncated>{items}{more}</ListBucketResult>"
        )
        return Answer(200, text.encode(), {"Content-Type": "application/xml"})

    def _google(
        self, path: str, asked: Mapping[str, str], headers: Mapping[str, str]
    ) -> Answer:  # fmt: skip
        bucket, _, key = path.partition("/b/")[2].partition("/o")
        key = unquote(key.lstrip("/"))
        if key and path.startswith("/download"):
            if asked.get("generation", self._generation(f"{bucket}/{key}")) != self._generation(
                f"{bucket}/{key}"
            ):
                return _json(404, {"error": {"code": 404, "message": "No such object"}})
            return self._send(f"{bucket}/{key}", headers)
        if key:
            if f"{bucket}/{key}" not in self.objects:
                return _json(404, {"error": {"code": 404, "message": "No such object"}})
            return _json(200, self._google_item(bucket, key))
        after, first = asked.get("pageToken", ""), asked.get("startOffset", "")
        most = min(int(asked.get("maxResults", 1000)), self.page)
        every = self.keys(bucket, asked.get("prefix", ""), after)
        found = [item for item in every if item[0] >= first]
        rest, found = found[most:], found[:most]
        items = [self._google_item(bucket, key) for key, _ in found]
        page: dict[str, Any] = {"kind": "storage#objects", "items": items}
        if rest:
            page["nextPageToken"] = found[-1][0]
        return _json(200, page)

    def _generation(self, name: str) -> str:
        return str(int(self._tag(name)[:12], 16)) if name in self.objects else ""

    def _google_item(self, bucket: str, key: str) -> dict[str, Any]:
        name = f"{bucket}/{key}"
        size = str(len(self.objects[name]))
        return {"name": key, "bucket": bucket, "size": size, "generation": self._generation(name)}

    def _hub(self, path: str) -> Answer:
        match = re.fullmatch(
            r"api/datasets/([^/]+/[^/]+)(?:/(tree|revision|paths-info)/([^/]+)/?(.*))?", path
        )
        if match is None or not any(name.startswith(match[1] + "/") for name in self.objects):
            headers = {"X-Error-Code": "RepoNotFound"}
            return Answer(404, b'{"error": "Repository not found"}', headers)
        repo, kind, _, below = match.groups()
        if kind in {None, "revision"}:
            return _json(200, {"id": repo, "sha": "a" * 40, "siblings": [], "tags": []})
        start = f"{repo}/{below}".rstrip("/") + "/"
        entries: dict[str, dict[str, Any]] = {}
        for name, data in sorted(self.objects.items()):
            if name.startswith(start):
                parts = name[len(repo) + 1 :].split("/")
                for depth in range(1, len(parts)):
                    folder = "/".join(parts[:depth])
                    if f"{repo}/{folder}/".startswith(start) and f"{repo}/{folder}/" != start:
                        entries[folder] = {"type": "directory", "path": folder, "oid": "b" * 40}
                key = name[len(repo) + 1 :]
                entries[key] = {
                    "type": "file", "path": key, "size": len(data), "oid": self._blob(name),
                }  # fmt: skip
        if not entries:
            return Answer(404, b'{"error": "none"}', {"X-Error-Code": "EntryNotFound"})
        return _json(200, [*entries.values()])

    def _blob(self, name: str) -> str:
        return hashlib.sha1(self.objects[name]).hexdigest()

    def _web(self, path: str, headers: Mapping[str, str]) -> Answer:
        if path in self.objects:
            return self._send(path, headers, web=True)
        start = path.rstrip("/") + "/"
        below = {
            name[len(start) :].partition("/")[0] + "/" * ("/" in name[len(start) :])
            for name in self.objects if name.startswith(start)
        }  # fmt: skip
        if not below:
            return Answer(404)
        links = "".join(f'<a href="{html.escape(quote(name))}">x</a>' for name in sorted(below))
        return Answer(200, links.encode(), {"Content-Type": "text/html"})

    def _send(
        self, name: str, headers: Mapping[str, str], *, web: bool = False, hub: bool = False
    ) -> Answer:  # fmt: skip
        """Return an object, or a stretch of it."""
        if name not in self.objects:
            if hub:
                return Answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return Answer(404) if web else _s3_error(404, "NoSuchKey")
        data, tag = self.objects[name], f'"{self._tag(name)}"'
        told = {"ETag": f'"{self._blob(name)}"' if hub else tag, "Accept-Ranges": "bytes"}
        if hub:
            told["X-Repo-Commit"] = "a" * 40
        second = int(self._tag(name)[:6], 16) % 60
        told["Last-Modified"] = f"Thu, 01 Jan 2026 00:00:{second:02} GMT"
        if web and not self.has_tags:
            del told["ETag"]
        if headers.get("If-Match", tag) != tag:
            return _s3_error(412, "PreconditionFailed")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
        if asked is None:
            return Answer(200, data, told)
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
        if start >= len(data):
            return _s3_error(416, "InvalidRange")
        told["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return Answer(206, data[start:end], told)

    def _pass_on(self, method: str, target: str, headers: Mapping[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, target, headers=dict(headers))
            answer = connection.getresponse()
            body = answer.read()
            kept = {n: v for n, v in answer.getheaders() if n.lower() not in _OWN_HEADERS}
            if method == "HEAD":
                kept["Content-Length"] = answer.headers["Content-Length"] or "0"
            return Answer(answer.status, body, kept)


_OWN_HEADERS = {"content-length", "connection", "transfer-encoding", "date", "server"}


def _json(status: int, value: Any) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _s3_error(status: int, code: str) -> Answer:
    text = f"{_XML}<Error><Code>{code}</Code><Message>{code}: made by a test</Message></Error>"
    return Answer(status, text.encode(), {"Content-Type": "application/xml"})


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients that go are a part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stores: Stores

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        stores = self.stores
        stores.log.append(f"{self.command} {self.path}")
        if self.command == "GET" and "Range" in self.headers:
            stores.count_get()
        answer = stores.answer(self.command, self.path, self.headers)  # type: ignore[arg-type]
        is_object = self.command == "GET" and "Range" in self.headers
        fault = stores.choose_fault(self.path) if is_object and answer.status < 300 else ""
        if fault in {"500", "503"}:
            answer, fault = _s3_error(int(fault), "SlowDown" if fault == "503" else "Internal"), ""
        if fault == "late":  # no answer before the client has lost patience
            with contextlib.suppress(OSError):
                self.connection.settimeout(60)
                self.connection.recv(1)
        if fault in {"late", "reset"}:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        body = answer.body
        if fault == "half without a length":
            self.send_header("Connection", "close")
        elif "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault:
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(length) or b"{}")
        stores = self.stores
        stores.log.append(f"POST {self.path}")
        repo = self.path.split("/paths-info/")[0].removeprefix("/api/datasets/")
        found = [
            {"type": "file", "path": path, "size": len(stores.objects[f"{repo}/{path}"]),
             "oid": stores._blob(f"{repo}/{path}")}
            for path in asked.get("paths", []) if f"{repo}/{path}" in stores.objects
        ]  # fmt: skip
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def upload(folder: Path, url: str) -> str:
    """Write the files of a folder to a store, and return the URL of the folder there."""
    fs, path = remote.file_system(url)
    for file in folder.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return url


@contextlib.contextmanager
def moto_server(request: pytest.FixtureRequest) -> Iterator[int]:
    """Start moto's server of S3 and yield its port; skip the test in short runs and without it."""
    if not request.config.getoption("--long"):
        pytest.skip("--long starts a server of S3")
    pytest.importorskip("s3fs")
    pytest.importorskip("boto3")
    moto: Any = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        remote._file_systems.clear()
        server.stop()


@contextlib.contextmanager
def moto_bucket(request: pytest.FixtureRequest, name: str) -> Iterator[Any]:
    """Yield a client of moto's server with a bucket; the environment names it to all libraries."""
    remote._file_systems.clear()  # of another address
    with moto_server(request) as port, pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            patch.setenv(key, value)
        client = pytest.importorskip("boto3").client("s3")
        client.create_bucket(Bucket=name)
        yield client
