"""Files of object stores and web servers by URL, through fsspec: listed once, read by ranged gets.

Reads: objects of ``s3://``, ``gs://``, ``hf://``, ``memory://`` and what else fsspec knows. Writes:
nothing. Addresses and credentials are those of the store's own library: environment variables and
configuration files, such as ``AWS_ENDPOINT_URL`` and ``AWS_PROFILE``, or fsspec's own, such as
``FSSPEC_S3_ANON=true``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from featcache.errors import ConfigError, DataError

_T = TypeVar("_T")
_WAITS = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds between the tries of a get, each up to twice as long
_BUFFER_BYTES = 1 << 18  # read at once while a tar's headers or a Parquet file's pages are found
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub",
             "http": "aiohttp", "https": "aiohttp"}  # fmt: skip
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
_CHANGED = "the object has changed since it was listed"

_file_systems: dict[tuple[str, int], Any] = {}
_lock = threading.Lock()


def url_of(data: str | os.PathLike[str]) -> str | None:
    """Return the URL that is meant by a text, or a ``Path`` made of one; None for a local path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", os.fspath(data), re.DOTALL)
    if match is None or match[1].lower() == "file":
        return None
    return f"{match[1].lower()}://{match[2]}"


@dataclass(frozen=True)
class RemoteFile:
    """An object of a store, as it was when it was listed. Keeps nothing open; picklable.

    Args:
        url: Where it is.
        num_bytes: Its size.
        tag: Its ETag or generation, or if there is neither its time; never taken for a hash.
    """

    url: str
    num_bytes: int
    tag: str

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return self.url

    @property
    def mtime_ns(self) -> int:
        """What stands for its time: a number that changes with its tag and its size."""
        text = f"{self.num_bytes} {self.tag}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

    def as_json(self) -> dict[str, Any]:
        """Return its fields as JSON values, for another process."""
        return {"url": self.url, "num_bytes": self.num_bytes, "tag": self.tag}

    def absolute(self) -> RemoteFile:
        """Return it for processes that have another current folder."""
        return self

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open it for reading, some of it ahead."""
        with io.BufferedReader(_Stretches(self), _BUFFER_BYTES) as file:
            yield file

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return a stretch of it, tried again a few times where that fails.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it has changed since it was listed.
        """
        if not num_bytes:
            return b""
        return _retry(self.url, lambda fs, path: self._get(fs, path, offset, num_bytes))

    def _get(self, fs: Any, path: str, offset: int, num_bytes: int) -> bytes:
        if hasattr(fs, "_call_s3"):
            data = _get_from_s3(fs, path, self.tag, offset, num_bytes)
        else:
            data = fs.cat_file(path, start=offset, end=offset + num_bytes)
            fs.invalidate_cache()  # else it tells what it has listed
            if self.tag and _tag_of(fs.info(path)) != self.tag:
                raise ValueError(_CHANGED)
        if len(data) != num_bytes:  # half a body
            raise ConnectionError(f"{len(data):,} of {num_bytes:,} bytes came")
        return bytes(data)


def _get_from_s3(fs: Any, path: str, tag: str, offset: int, num_bytes: int) -> bytes:
    """Get a stretch of an object if it is still the one that was listed."""
    from fsspec.asyn import sync

    bucket, key, _ = fs.split_path(path)
    wanted = {"Range": f"bytes={offset}-{offset + num_bytes - 1}"}
    if tag.startswith('"'):
        wanted["IfMatch"] = tag

    async def get() -> bytes:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, **wanted)
        try:
            return bytes(await answer["Body"].read())
        finally:
            answer["Body"].close()

    try:
        return bytes(sync(fs.loop, get))
    except OSError as error:
        if any(mark in f"{error} {error.__cause__}" for mark in ("PreconditionFailed", "412")):
            raise ValueError(_CHANGED) from error
        raise


class _Stretches(io.RawIOBase):
    """An object as a file that can be sought in."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.num_bytes}
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        size = max(0, min(len(view), self._file.num_bytes - self._position))
        if size:
            view[:size] = self._file.read(self._position, size)
        self._position += size
        return size


# ----------------------------------------------------------------------------------------- listing


def list_files(url: str) -> dict[str, RemoteFile]:
    """Return the objects below a URL, or those that a glob matches: path below it -> object.

    Of a glob the paths begin behind the last ``/`` before its first special character.

    Raises:
        DataError: If the store cannot be reached, refuses, or has nothing there.
        ConfigError: If a package is not installed.
    """
    start = url
    if "*" in url:
        start = url[: url.index("*")].rpartition("/")[0]

    def find(fs: Any, path: str) -> dict[str, Any]:
        found = fs.glob(path, detail=True) if "*" in url else fs.find(path, detail=True)
        return {
            name: info if info.get("size") is not None else fs.info(name)
            for name, info in found.items() if info.get("type") != "directory"
        }  # fmt: skip

    with refusals(url):
        found = _retry(url, find, _WAITS[1:2])  # the libraries try again themselves, for seconds
        top = _file_system(start)[0]._strip_protocol(start)
    if not found:
        raise DataError("data", expected="objects of a store", found="none", where=url)
    files: dict[str, RemoteFile] = {}
    for name, info in found.items():
        below = name[len(top) :].strip("/") if name != top else ""
        if not info.get("size") and name.endswith("/"):
            continue  # a folder's mark
        place = f"{start.rstrip('/')}/{below}" if below else start
        if info.get("size") is None:
            raise DataError(
                "data", expected="a store that tells the sizes of its objects", where=place,
                found="none", hint="Copy the images here",
            )  # fmt: skip
        files[below] = RemoteFile(place, int(info["size"] or 0), _tag_of(info))
    return files


def list_all(urls: Sequence[str]) -> tuple[str, dict[str, RemoteFile]]:
    """Return the folder of all objects of some URLs, and path below it -> object.

    Raises:
        DataError: As ``list_files``; or if one is a CSV or a zip.
    """
    found: dict[str, RemoteFile] = {}
    starts = []
    for url in urls:
        if url.lower().endswith((".csv", ".zip")):
            raise DataError(
                "data", expected="images, tars or Parquet files in a store", where=url,
                found=f"a {url[-4:].lower()} file", hint="Copy it here: it is not read by URL",
            )  # fmt: skip
        files = list_files(url)
        is_file = [*files] == [""]
        starts.append(url.rpartition("/")[0] if "*" in url or is_file else url.rstrip("/"))
        if "*" in url:
            starts[-1] = url[: url.index("*")].rpartition("/")[0]
        found |= {file.url: file for file in files.values()}
    levels = itertools.takewhile(
        lambda names: len(set(names)) == 1,
        zip(*(start.split("/") for start in starts), strict=False),
    )
    top = "/".join(names[0] for names in levels)
    return top, {url[len(top) + 1 :]: file for url, file in sorted(found.items())}


@dataclass(frozen=True)
class RemoteStore:
    """Reads images that are objects of their own: see ``samples.Store``. Picklable.

    Args:
        url: Of the folder.
        tags: Path of an image below it -> its size and its tag.
    """

    url: str
    tags: dict[str, tuple[int, str]]

    def read(self, path: str) -> bytes:
        """Return the bytes of an image."""
        num_bytes, tag = self.tags[path]
        return RemoteFile(f"{self.url}/{path}", num_bytes, tag).read(0, num_bytes)

    def place_of(self, path: str) -> tuple[int, int]:
        """Return the same for all: any order is as fast."""
        return 0, 0

    def path_inside(self, path: str) -> str:
        """Return the path itself."""
        return path


@contextlib.contextmanager
def refusals(url: str) -> Iterator[None]:
    """Turn what a store refuses into one line.

    Raises:
        DataError: If it cannot be reached, or refuses.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(
            "data", expected="a store that answers", found=f"{reason}".splitlines()[0][:200],
            where=url, hint="Check the address and the credentials",
        ) from error  # fmt: skip


def _tag_of(info: Mapping[str, Any]) -> str:
    for key in ("ETag", "etag", "generation", "md5Hash", "blob_id", "LastModified", "mtime",
                "last_modified", "Last-Modified", "created"):  # fmt: skip
        value = info.get(key)
        if value is not None:
            seconds = getattr(value, "timestamp", None)
            return f"{seconds():.6f}" if seconds else (
                f"{value:.6f}" if isinstance(value, float) else f"{value}"
            )  # fmt: skip
    return ""


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, one for all threads of a process, and its path in that.

    Raises:
        ConfigError: If a package is not installed.
    """
    protocol, key = url.partition(":")[0], (url.partition(":")[0], os.getpid())
    try:
        import fsspec
    except ImportError as error:
        raise _missing("fsspec") from error
    with _lock:
        if key not in _file_systems:
            try:
                _file_systems[key] = fsspec.filesystem(protocol)
            except ImportError as error:
                raise _missing(_PACKAGES.get(protocol, f"fsspec names for {protocol}")) from error
            except ValueError as error:
                raise DataError(
                    "data", expected="a URL that fsspec knows", found=f"{protocol}://", where=url
                ) from error
        fs = _file_systems[key]
    return fs, fs._strip_protocol(url)


def _missing(package: str) -> ConfigError:
    return ConfigError(
        "URL", expected=f"the package {package}", found="none",
        hint=f"pip install 'featcache[remote]' {package}",
    )  # fmt: skip


def _retry(url: str, call: Callable[[Any, str], _T], waits: Sequence[float] = _WAITS) -> _T:
    """Call with the file system of a URL, again after growing waits while the store fails.

    Raises:
        OSError: If it fails for good, or still.
        ValueError: If the object has changed.
    """
    has_renewed = False
    for wait in (*waits, None):
        fs, path = _file_system(url)
        try:
            return call(fs, path)
        except (FileNotFoundError, IsADirectoryError):
            raise
        except PermissionError:
            if has_renewed:
                raise
            has_renewed = True  # credentials may have been rotated: they are read anew, once
            _forget(fs, url)
        except _temporary() as error:
            if type(error).__name__ in _NO_CREDENTIALS:
                raise PermissionError(f"no credentials: {error}") from error
            if wait is None:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise OSError(f"{reason} (tried {len(waits) + 1} times)") from error
            time.sleep(wait * (1 + random.random()))
    raise PermissionError("refused")


def _forget(fs: Any, url: str) -> None:
    with _lock:
        _file_systems.pop((url.partition(":")[0], os.getpid()), None)
    if not url.startswith("memory:"):
        type(fs).clear_instance_cache()


def _temporary() -> tuple[type[BaseException], ...]:
    """Return the errors that may pass: those of the libraries that are loaded among them."""
    found: list[type[BaseException]] = [OSError, TimeoutError]
    for module, name in (
        ("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"), ("asyncio", "TimeoutError"),
    ):  # fmt: skip
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            found.append(kind)
    return tuple(found)
