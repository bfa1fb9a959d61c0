"""Files of object stores and web servers by URL, through fsspec: listed once, read by ranged gets.

Gets that fail are tried again, with growing waits; ``store_requests`` has what each kind of store
is asked.

Reads: objects of ``s3://``, ``gs://``, ``hf://``, ``memory://`` and what else fsspec knows. Writes:
nothing. Addresses and credentials are those of the store's own library: environment variables and
configuration files, such as ``AWS_ENDPOINT_URL`` and ``AWS_PROFILE``, or fsspec's own, such as
``FSSPEC_S3_ANON=true``.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from featcache.data import store_requests, unfinished
from featcache.data.listing import compile_glob
from featcache.data.store_requests import Found, Stretch
from featcache.errors import ConfigError, DataError, printable
from featcache.formatting import count
from featcache.progress import Progress
from featcache.runtime import log_line

_T = TypeVar("_T")
_WAITS = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds between the tries of a get, each up to twice as long
_GIVE_UP_SECONDS = 120.0  # after which there is no further try
_MOST_GIVEN_UP = 8  # gets in turn: then others are not tried for long either
_PAGES_TO_KEEP = 10  # of a listing that is interrupted: fewer come again in a moment
_BUFFER_BYTES = 1 << 18  # read at once while a tar's headers or a Parquet file's pages are found
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub",
             "http": "aiohttp", "https": "aiohttp"}  # fmt: skip
_file_systems: dict[tuple[str, int], Any] = {}
_given_up: Counter[str] = Counter()  # of each store, since a get of it came
_lock = threading.Lock()


def url_of(data: str | os.PathLike[str]) -> str | None:
    """Return the URL that is meant by a text, or a ``Path`` made of one; None for a local path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", os.fspath(data), re.DOTALL)
    if match is None or match[1].lower() == "file":
        return None
    return f"{match[1].lower()}://{match[2]}"


@dataclass(frozen=True, slots=True)
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
    def open(self, buffer_bytes: int = _BUFFER_BYTES) -> Iterator[BinaryIO]:
        """Open it for reading, so many bytes at once or more."""
        with io.BufferedReader(_Stretches(self), buffer_bytes) as file:
            yield file

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return a stretch of it, tried again a few times where that fails.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it has changed since it was listed.
        """
        if not num_bytes:
            return b""
        return retry(self.url, lambda fs, path: self._get(fs, path, offset, num_bytes))

    def _get(self, fs: Any, path: str, offset: int, num_bytes: int) -> bytes:
        return store_requests.get(fs, path, Stretch(self.tag, self.num_bytes, offset, num_bytes))


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


def list_files(url: str, *, progress: bool | str = False) -> dict[str, RemoteFile]:
    """Return the objects below a URL, or those that a glob matches: path below it -> object.

    Of a glob the paths begin behind the last ``/`` before its first special character. A listing
    of S3 or Google Cloud Storage that is interrupted is gone on with within an hour.

    Args:
        url: Of an object, a folder or a glob.
        progress: As for ``progress.Progress``.

    Raises:
        DataError: If the store cannot be reached, refuses, or has nothing there.
        ConfigError: If a package is not installed.
    """
    start = url[: url.index("*")].rpartition("/")[0] if "*" in url else url
    with refusals(url):
        fs, top = file_system(start)
        if store_requests.can_continue(fs):
            found = _list_pages(url, progress=progress)
        else:
            found = retry(url, store_requests.list_whole, _WAITS[:3])
    if not found:
        raise DataError("data", expected="objects of a store", found="none", where=url)
    files: dict[str, RemoteFile] = {}
    found.reverse()
    while found:  # what is made of it takes its place: of a million, 200 MB less
        name, num_bytes, tag = found.pop()
        below = name[len(top) :].strip("/") if name != top else ""
        if not num_bytes and name.endswith("/"):
            continue  # a folder's mark
        place = f"{start.rstrip('/')}/{below}" if below else start
        if num_bytes is None:
            raise DataError(
                "data", expected="a store that tells the sizes of its objects", where=place,
                found="none", hint="Copy the images here",
            )  # fmt: skip
        files[below] = RemoteFile(place, num_bytes, tag)
    return files


def _list_pages(url: str, *, progress: bool | str) -> list[Found]:
    """Return the objects of a folder, a glob or one object, page by page."""
    path = file_system(url)[1]
    bucket, _, key = path.partition("/")
    pattern = compile_glob(key) if "*" in key else None
    prefix = key.partition("*")[0] if pattern else f"{key}/" if key else ""
    address = retry(url, lambda fs, _: store_requests.address_of(fs), _WAITS[:3])
    kept_at = unfinished.place_of(f"{url} {address}")
    after, found = unfinished.take(kept_at)
    if found:
        log_line(f"listing {printable(url)} goes on after {count(len(found), 'object')}")
    num_pages = _PAGES_TO_KEEP if found else 0

    def ask(fs: Any, _: str) -> tuple[list[Found], str]:
        return store_requests.list_page(fs, bucket, prefix, after)

    with Progress("list", "object", 0, shown=progress) as shown:
        try:
            while True:
                # The first answer tells whether the store is there: no long waits for that.
                page, after = retry(url, ask, _WAITS if num_pages else _WAITS[:3])
                found += page
                num_pages += 1
                shown.move_to(len(found))
                if not after:
                    break
        except BaseException:
            if num_pages >= _PAGES_TO_KEEP:  # Ctrl-C may come before a page is in the list
                unfinished.keep(kept_at, found[-1].name[len(bucket) + 1 :], found)
            raise
    if pattern is not None:
        return [one for one in found if pattern.fullmatch(one.name[len(bucket) + 1 :])]
    if found or not key:
        return found
    page, _ = retry(
        url, lambda fs, _: store_requests.list_page(fs, bucket, key, ""), _WAITS[:3]
    )  # fmt: skip
    return [one for one in page if one.name == path]  # which is the first, if it is there


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


def file_system(url: str) -> tuple[Any, str]:
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
                _check_opens(fsspec.get_filesystem_class(protocol), protocol, url)
                options = store_requests.options_of(protocol)
                made = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
                store_requests.prepare(made)
                _file_systems[key] = made
            except ImportError as error:
                if package := _PACKAGES.get(protocol):
                    raise _missing(package) from error
                raise ConfigError(
                    "URL", expected=f"the package that {protocol}:// needs", found=error, where=url
                ) from error
            except ValueError as error:
                raise DataError(
                    "data", expected="a URL that fsspec knows", found=f"{protocol}://", where=url
                ) from error
        fs = _file_systems[key]
    return fs, fs._strip_protocol(url)


def _check_opens(kind: type[Any], protocol: str, url: str) -> None:
    """Refuse a kind of file system that has to be told more than its protocol.

    Raises:
        DataError: If something is needed that is not in its variables either.
    """
    from fsspec.config import conf

    empty = inspect.Parameter.empty
    parameters = [*inspect.signature(kind.__init__).parameters.values()][1:]
    needed = [
        p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is empty
    ]
    if missing := [name for name in needed if name not in conf.get(protocol, {})]:
        variables = " and ".join(f"FSSPEC_{protocol}_{name}".upper() for name in missing)
        raise DataError(
            "data", expected=f"the {' and the '.join(missing)} of a {protocol} server",
            found="none", where=url, hint=f"Set {variables}",
        )  # fmt: skip


def _missing(package: str) -> ConfigError:
    return ConfigError(
        "URL", expected=f"the package {package}", found="none",
        hint=f"pip install 'featcache[remote]' {package}",
    )  # fmt: skip


def retry(url: str, call: Callable[[Any, str], _T], waits: Sequence[float] = _WAITS) -> _T:
    """Call with the file system of a URL, again after growing waits while the store fails.

    What it refuses is asked again with credentials that are read anew: they may be renewed while
    one waits. Where several gets in turn were given up, the store is taken for gone: until a get
    comes again each is tried twice, so that a run ends soon.

    Raises:
        OSError: If it fails for good, or still.
        ValueError: If the object has changed.
    """
    begin, store = time.monotonic(), "/".join(url.split("/", 3)[:3])
    for number, wait in enumerate((*waits, None), 1):
        fs, path = file_system(url)
        try:
            result = call(fs, path)
        except store_requests.errors() as raised:
            error = store_requests.told_by(raised)
            meant = store_requests.lasting(error)
            is_refused = type(meant) is PermissionError and "no credentials" not in f"{meant}"
            if meant is not None and not is_refused:
                raise meant from error
            if is_refused:
                _forget(fs, url)
            is_late = time.monotonic() - begin > _GIVE_UP_SECONDS
            if wait is None or is_late or (_given_up[store] >= _MOST_GIVEN_UP and number > 1):
                _given_up[store] += 1
                reason = f"{error}".splitlines()[0] if f"{error}" else "no answer in time"
                kind = PermissionError if is_refused else OSError
                raise kind(f"{reason} (tried {number} times)") from error
            time.sleep(wait * (1 + random.random()))
        else:
            _given_up.pop(store, None)
            return result
    raise AssertionError("the last wait is None")


def _forget(fs: Any, url: str) -> None:
    """Have the file system of a URL made anew, unless another thread has done that."""
    key = (url.partition(":")[0], os.getpid())
    with _lock:
        if _file_systems.get(key) is fs:
            del _file_systems[key]
