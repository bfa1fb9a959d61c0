"""What each kind of store is asked: a page of its listing, a stretch of an object as it was listed.

Of ``s3://``, ``gs://``, ``hf://`` and ``https://`` the answer to a get itself says whether the
object is still the one that was listed: one request a stretch. Others are asked once more.

Reads: objects of stores. Writes: nothing.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")
CHANGED = "the object has changed since it was listed"
_CONNECT_SECONDS, _SILENT_SECONDS = 10, 30
_SLOWEST_BYTES = 1 << 14  # a second: an object that comes slower is asked for again
_CONNECTIONS = 64  # of botocore's own 10 most workers would wait for one
_LIBRARIES = (
    ("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"), ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"), ("httpx", "HTTPError"), ("httpx2", "HTTPError"),
    ("huggingface_hub.errors", "EntryNotFoundError"), ("azure.core.exceptions", "AzureError"),
)  # fmt: skip
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError",
                   "DefaultCredentialsError", "ProfileNotFound"}  # fmt: skip


class Found(NamedTuple):
    """An object of a listing.

    Args:
        name: In the words of its file system: with the bucket, without the protocol.
        num_bytes: Its size; None where the store does not tell.
        tag: Its ETag or generation, or if there is neither its time.
    """

    name: str
    num_bytes: int | None
    tag: str


class Stretch(NamedTuple):
    """A stretch of an object that was listed.

    Args:
        tag: The object's tag.
        total: The object's size.
        offset: Where the stretch begins.
        num_bytes: How long it is, at least 1.
    """

    tag: str
    total: int
    offset: int
    num_bytes: int

    @property
    def header(self) -> dict[str, str]:
        """The header by which HTTP asks for it."""
        return {"Range": f"bytes={self.offset}-{self.offset + self.num_bytes - 1}"}


def time_limit(num_bytes: int) -> float:
    """Return the seconds that a get may take."""
    return _SILENT_SECONDS + num_bytes / _SLOWEST_BYTES


def options_of(protocol: str) -> dict[str, Any]:
    """Return options of a file system: time limits, and one try where the caller tries again.

    Those that the user gave to fsspec (``FSSPEC_S3`` and the like) go before them.
    """
    from fsspec.config import conf

    def over(key: str, ours: dict[str, Any]) -> dict[str, Any]:
        return {key: ours | dict(conf.get(protocol, {}).get(key) or {})}

    options: dict[str, Any] = {}
    if protocol in {"s3", "s3a"}:
        options = over("config_kwargs", {
            "connect_timeout": _CONNECT_SECONDS, "read_timeout": _SILENT_SECONDS,
            "max_pool_connections": _CONNECTIONS, "retries": {"total_max_attempts": 1},
        })  # fmt: skip
    elif protocol in {"gs", "gcs", "http", "https"}:
        try:
            from aiohttp import ClientTimeout
        except ImportError:
            return {}  # said by fsspec
        limit = ClientTimeout(total=None, connect=_SILENT_SECONDS, sock_read=_SILENT_SECONDS,
                              sock_connect=_CONNECT_SECONDS)  # fmt: skip
        if protocol in {"http", "https"}:
            options = over("client_kwargs", {"timeout": limit})
        elif "requests_timeout" not in conf.get(protocol, {}):
            options = {"requests_timeout": limit}
        # It logs the traceback of each failure, which is said in a line later.
        logging.getLogger("gcsfs").addHandler(logging.NullHandler())
    return options


def prepare(fs: Any) -> None:
    """Make a file system ask once: the caller tries again, in one way for all of them.

    Of a silent server 5 times 5 tries of s3fs, six times over, would take half an hour.
    """
    if _kind(fs) == "s3":
        fs.retries = 1
    once = getattr(getattr(type(fs), "_request", None), "__wrapped__", None)
    if _kind(fs) == "gs" and once is not None:
        fs._request = partial(once, fs)


# ------------------------------------------------------------------------------------------- gets


def get(fs: Any, path: str, wanted: Stretch) -> bytes:
    """Return a stretch of an object.

    Args:
        fs: Its file system.
        path: Where the object is in that.
        wanted: What of it.

    Raises:
        OSError: If it did not come, or not whole.
        ValueError: If the object has changed, or the server has no stretches.
    """
    name = _kind(fs)
    if name == "s3":
        data = _get_from_s3(fs, path, wanted)
    elif name == "gs" and wanted.tag.isdigit():
        data = _get_from_google(fs, path, wanted)
    elif name == "hf" and wanted.tag:
        data = _get_from_hub(fs, path, wanted)
    elif name == "http":
        data = _get_from_web(fs, path, wanted)
    else:
        data = fs.cat_file(path, start=wanted.offset, end=wanted.offset + wanted.num_bytes)
        fs.invalidate_cache()  # else it tells what it has listed
        if wanted.tag and tag_of(fs.info(path)) != wanted.tag:
            raise ValueError(CHANGED)
    if len(data) != wanted.num_bytes:  # half a body
        raise ConnectionError(f"{len(data):,} of {wanted.num_bytes:,} bytes came")
    return bytes(data)


def _kind(fs: Any) -> str:
    """Return ``s3``, ``gs``, ``hf`` or ``http``; "" for another file system."""
    if hasattr(fs, "_call_s3"):
        return "s3"
    package, _, module = type(fs).__module__.partition(".")
    kinds = {"gcsfs": "gs", "huggingface_hub": "hf"}
    return "http" if module == "implementations.http" else kinds.get(package, "")


def _get_from_s3(fs: Any, path: str, wanted: Stretch) -> bytes:
    from fsspec.asyn import sync

    bucket, key, _ = fs.split_path(path)
    asked = dict(wanted.header)
    if wanted.tag.startswith('"'):
        asked["IfMatch"] = wanted.tag

    async def ask() -> bytes:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, **asked)
        try:
            if "IfMatch" in asked and answer.get("ETag", wanted.tag) != wanted.tag:
                raise ValueError(CHANGED)  # a server that does not heed it
            return bytes(await answer["Body"].read())
        finally:
            answer["Body"].close()

    return bytes(sync(fs.loop, ask, timeout=time_limit(wanted.num_bytes)))


def _get_from_google(fs: Any, path: str, wanted: Stretch) -> bytes:
    from fsspec.asyn import sync

    async def ask() -> bytes:
        # Its ``_cat_file`` asks for the kind of the bucket first, each time where it may not know.
        url = fs.url(path, generation=wanted.tag)
        return bytes((await fs._call("GET", url, headers=wanted.header))[1])

    try:
        return bytes(sync(fs.loop, ask, timeout=time_limit(wanted.num_bytes)))
    except FileNotFoundError as error:  # that generation of it
        raise ValueError(f"{CHANGED}, or is gone") from error


def _get_from_hub(fs: Any, path: str, wanted: Stretch) -> bytes:
    hub: Any = importlib.import_module("huggingface_hub")
    at = fs.resolve_path(path)
    if not hasattr(at, "repo_id"):  # a bucket, whose files have no address of that kind
        end = wanted.offset + wanted.num_bytes
        return bytes(fs.cat_file(path, start=wanted.offset, end=end, cache_type="none"))
    url = hub.hf_hub_url(
        at.repo_id, at.path_in_repo, repo_type=at.repo_type, revision=at.revision,
        endpoint=fs.endpoint,
    )  # fmt: skip
    answer = hub.utils.http_backoff(
        "GET", url, headers=hub.utils.build_hf_headers(token=fs.token) | wanted.header,
        timeout=_SILENT_SECONDS,
        retry_on_status_codes=(429,), retry_on_exceptions=(),  # the caller tries again
    )  # fmt: skip
    hub.utils.hf_raise_for_status(answer)
    first = (*answer.history, answer)[0].headers  # large files are sent on to another server
    told = first.get("X-Linked-ETag") or first.get("ETag") or wanted.tag
    _check(answer, answer.status_code, told.removeprefix("W/").strip('"'), wanted)
    return bytes(answer.content)


def _get_from_web(fs: Any, path: str, wanted: Stretch) -> bytes:
    from fsspec.asyn import sync

    asked = {"Accept-Encoding": "identity", **wanted.header}
    options = fs.kwargs | {"headers": {**fs.kwargs.get("headers", {}), **asked}}

    async def ask() -> bytes:
        session = await fs.set_session()
        async with session.get(fs.encode_url(path), **options) as answer:
            answer.raise_for_status()
            # If-Match would be refused for weak tags and not heeded by simple servers.
            told = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or wanted.tag
            _check(answer, answer.status, told, wanted)
            return bytes(await answer.read())

    return bytes(sync(fs.loop, ask, timeout=time_limit(wanted.num_bytes)))


def _check(answer: Any, status: int, told: str, wanted: Stretch) -> None:
    """Compare what an answer says of the whole object with what was listed."""
    if status == 200 and wanted.num_bytes < wanted.total:
        raise ValueError("the server has no stretches of files (Range), only whole ones")
    size = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if (wanted.tag and told != wanted.tag) or (size.isdigit() and int(size) != wanted.total):
        raise ValueError(CHANGED)


# ----------------------------------------------------------------------------------------- listing


def can_continue(fs: Any) -> bool:
    """Return whether a listing can go on after any key."""
    return _kind(fs) in {"s3", "gs"}


def address_of(fs: Any) -> str:
    """Return the address behind the URLs of a file system that ``can_continue``."""
    return str(fs.s3.meta.endpoint_url if _kind(fs) == "s3" else fs.base)


def list_page(fs: Any, bucket: str, prefix: str, after: str) -> tuple[list[Found], str]:
    """Return the objects of a page of a listing, sorted, and its last key, "" if it is the last.

    Args:
        fs: One that ``can_continue``.
        bucket: Its name.
        prefix: Of the keys.
        after: The key that was last; "" begins.
    """
    from fsspec.asyn import sync

    list_of = _list_s3 if _kind(fs) == "s3" else _list_google
    token = ""
    while True:  # a page may be empty though more follow
        page = sync(fs.loop, list_of, fs, bucket, prefix, after, token, timeout=time_limit(1 << 20))
        found = [one for one in page[0] if one.name != f"{bucket}/{after}"]
        token = page[1]
        if found or not token:
            return found, found[-1].name[len(bucket) + 1 :] if token else ""


async def _list_s3(
    fs: Any, bucket: str, prefix: str, after: str, token: str
) -> tuple[list[Found], str]:  # fmt: skip
    asked = {"ContinuationToken": token} if token else {"StartAfter": after} if after else {}
    page = await fs._call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **asked)
    items = page.get("Contents", [])
    found = [Found(f"{bucket}/{one['Key']}", one["Size"], one.get("ETag", "")) for one in items]
    return found, page["NextContinuationToken"] if page.get("IsTruncated") else ""


async def _list_google(
    fs: Any, bucket: str, prefix: str, after: str, token: str
) -> tuple[list[Found], str]:  # fmt: skip
    page = await fs._call(
        "GET", "b/{}/o", bucket, json_out=True, prefix=prefix, startOffset=after or None,
        pageToken=token or None, fields="nextPageToken,items(name,size,generation)",
    )  # fmt: skip
    found = [
        Found(f"{bucket}/{one['name']}", int(one["size"]), one.get("generation", ""))
        for one in page.get("items", [])
    ]
    return found, page.get("nextPageToken", "")


def list_whole(fs: Any, path: str) -> list[Found]:
    """Return the objects of a folder, or of a glob, of a store that lists all at once."""
    if _kind(fs) == "http" and "*" not in path and not path.endswith("/"):
        info = fs.info(path)  # else a file would be read whole, for the links in it
        if info.get("mimetype") != "text/html" and info.get("size") is not None:
            return [found_of(path, info)]
    # Of a web server fsspec would leave out the folders that cannot be listed just now.
    strict = {"on_error": "raise"} if _kind(fs) == "http" else {}
    ask = fs.glob if "*" in path else fs.find
    found = ask(path, detail=True, **strict)
    files = {name: info for name, info in found.items() if info.get("type") != "directory"}
    without = [name for name, info in files.items() if info.get("size") is None]
    files |= dict(zip(without, ask_all(without, fs.info), strict=True))
    return [found_of(name, info) for name, info in files.items()]


def ask_all(names: Sequence[str], ask: Callable[[str], _T]) -> list[_T]:
    """Return what is told of each of some files by a web server: a request for each."""
    with ThreadPoolExecutor(_CONNECTIONS // 2) as pool:
        return list(pool.map(ask, names))


def found_of(name: str, info: Mapping[str, Any]) -> Found:
    """Return an object by what its store tells of it."""
    return Found(name, info.get("size"), tag_of(info))


def tag_of(info: Mapping[str, Any]) -> str:
    """Return what tells a change of an object: ETag, generation, hash or time; "" for nothing."""
    lfs = info.get("lfs")
    if lfs:  # of the Hub: the ETag of a large file is that of its content, not of its pointer
        return f"{lfs['sha256'] if isinstance(lfs, Mapping) else lfs.sha256}"
    for key in ("ETag", "etag", "generation", "md5Hash", "blob_id", "LastModified", "mtime",
                "last_modified", "Last-Modified", "created"):  # fmt: skip
        value = info.get(key)
        if value is not None:
            seconds = getattr(value, "timestamp", None)
            return f"{seconds():.6f}" if seconds else (
                f"{value:.6f}" if isinstance(value, float) else f"{value}"
            )  # fmt: skip
    return ""


# ------------------------------------------------------------------------------------------ errors


def errors() -> tuple[type[BaseException], ...]:
    """Return the errors of stores: those of the libraries that are loaded among them."""
    found: list[type[BaseException]] = [OSError, ValueError]
    for module, name in _LIBRARIES:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            found.append(kind)
    return tuple(found)


def told_by(error: BaseException) -> BaseException:
    """Return the error that says what happened.

    fsspec says of all failures of a web server that is asked about a file that there is no such
    file, and names its URL alone: also of a closed port, and of what may pass.
    """
    cause = error.__cause__
    is_vague = isinstance(error, FileNotFoundError) and f"{error}".startswith("http")
    return cause if is_vague and cause is not None else error


def lasting(error: BaseException) -> Exception | None:
    """Return what an error means for good; None if it may pass, so that asking again is worth it.

    Returns:
        ``FileNotFoundError``, ``PermissionError`` (credentials may be renewed), ``ValueError`` of
        an object that has changed, or an ``OSError`` of a request that is refused as it is.
    """
    text = f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
    status = _status_of(error)
    if status in {404, 410} or isinstance(error, FileNotFoundError):
        return FileNotFoundError(text)
    if type(error).__name__ in _NO_CREDENTIALS:
        return PermissionError(f"no credentials: {text}")
    if status in {401, 403} or isinstance(error, PermissionError):
        return PermissionError(text)
    if status in {412, 416} or isinstance(error, FileExistsError):
        return ValueError(CHANGED)
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return ValueError(text)
    if isinstance(error, IsADirectoryError) or (400 <= status < 500 and status not in {408, 429}):
        return OSError(text)
    return None


def _status_of(error: BaseException) -> int:
    """Return the HTTP status that an error of any of the libraries stands for; 0 for none."""
    if f"{error}".startswith("Forbidden: "):  # gcsfs
        return 403
    for one in (error, error.__cause__):
        answer = getattr(one, "response", None)
        if isinstance(answer, Mapping):  # botocore
            return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    # Not of the cause: half a body is caused by what aiohttp counts as a bad answer, 400.
    found = getattr(getattr(error, "response", None), "status_code", None)
    found = found or getattr(error, "status", None) or getattr(error, "code", None)
    return int(f"{found}") if f"{found}".isdigit() else 0
